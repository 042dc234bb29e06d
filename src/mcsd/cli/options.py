"""The options that commands share, with the names and defaults of the Python API.

A command takes a group of them as one parameter (`mcsd.config.EngineOptions`, `SamplingArguments`) or single ones.
"""

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_origin

import typer

from mcsd.cli.output import debug_enabled, fetch_missing, quiet_libraries, spinner
from mcsd.config import EngineOptions
from mcsd.errors import DownloadFailed, InvalidParameter
from mcsd.loading.catalog import CATALOG, default_draft
from mcsd.loading.disk_usage import has_copy
from mcsd.params import MAX_GRAMMAR, SamplingParams
from mcsd.system import collector_paused

if TYPE_CHECKING:
    from mcsd.engine import Engine

_sampling = functools.partial(typer.Option, rich_help_panel="Sampling")

Temperature = Annotated[float | None, _sampling("--temperature", help="Sampling temperature; 0 is greedy.")]
TopK = Annotated[int | None, _sampling("--top-k", help="Keep the k most probable tokens; 0 keeps all.")]
TopP = Annotated[float | None, _sampling("--top-p", help="Keep the most probable tokens up to this total probability.")]
MinP = Annotated[float | None, _sampling("--min-p", help="Drop tokens below this fraction of the highest probability.")]
TypicalP = Annotated[
    float | None, _sampling("--typical-p", help="Keep the most typical tokens up to this total probability.")
]
MaxNewTokens = Annotated[int | None, _sampling("--max-new-tokens", "-n", help="Maximum number of new tokens.")]
MinNewTokens = Annotated[
    int | None, _sampling("--min-new-tokens", help="Minimum number of new tokens before the text may end.")
]
Seed = Annotated[
    int | None, _sampling("--seed", help="Random seed; makes the text reproducible.", show_default="random")
]
Stop = Annotated[list[str] | None, _sampling("--stop", help="End the text before this string. Can be repeated.")]
StopTokenIds = Annotated[
    list[int] | None, _sampling("--stop-token-ids", help="End the text at this token, too. Can be repeated.")
]
IncludeStop = Annotated[bool | None, _sampling("--include-stop", help="Keep the stop string in the text.")]
SkipSpecialTokens = Annotated[
    bool | None,
    _sampling("--skip-special-tokens/--no-skip-special-tokens", help="Leave special tokens out of the text."),
]
BadWords = Annotated[list[str] | None, _sampling("--bad-words", help="Never generate this text. Can be repeated.")]
RepetitionPenalty = Annotated[
    float | None, _sampling("--repetition-penalty", help="Above 1 penalizes tokens that already occurred.")
]
PresencePenalty = Annotated[
    float | None, _sampling("--presence-penalty", help="Subtracted from the logit of each token that already occurred.")
]
FrequencyPenalty = Annotated[
    float | None, _sampling("--frequency-penalty", help="Subtracted from a token's logit for each occurrence so far.")
]
JsonSchema = Annotated[
    str | None, _sampling("--json-schema", help="Answer in JSON that this schema allows: a file, or JSON text.")
]
JsonObject = Annotated[bool | None, _sampling("--json-object", help="Answer with a JSON object.")]
Regex = Annotated[str | None, _sampling("--regex", help="Answer with a text that matches this regular expression.")]
Grammar = Annotated[
    Path | None, _sampling("--grammar", help="Answer with a text of the grammar in this file (Lark, for llguidance).")
]
IgnoreEos = Annotated[bool | None, _sampling("--ignore-eos", help="Continue after an end-of-sequence token.")]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Color = Annotated[bool | None, typer.Option("--color/--no-color", help="Color the drafted tokens.")]
System = Annotated[
    str | None, typer.Option("--system", help="System prompt.", show_default="that of the chat template, if any")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the messages of libraries.")]


def load_engine(options: EngineOptions) -> "Engine":
    """Download missing weights, with a progress bar, load the engine and calibrate it.

    Raises:
        ModelError, OptionError: see `mcsd.Engine.load`.
    """
    fetch_pair(options.target, options.draft if options.tree != "none" else options.target)
    first = options.target in CATALOG and not has_copy(str(options.target))
    stage = f"reading {options.target} and compiling kernels, once" if first else f"loading {options.target}"
    with spinner(stage, once=first), collector_paused():
        from mcsd.engine import Engine

        engine = Engine.from_options(options)
    with spinner(f"measuring the speed of {options.target} and its draft, once"):
        engine.calibrate()
    return engine


def fetch_pair(target: str | Path, draft: str | Path | None) -> None:
    """Download missing weights of target and draft; a default draft may be missing."""
    fetch_missing(target, draft)
    if draft is None:
        with suppress(DownloadFailed):
            fetch_missing(default_draft(target))


@dataclass(frozen=True)
class SamplingArguments:
    """The arguments of `mcsd.SamplingParams` that have an option."""

    temperature: Temperature = None
    top_k: TopK = None
    top_p: TopP = None
    min_p: MinP = None
    typical_p: TypicalP = None
    max_new_tokens: MaxNewTokens = None
    min_new_tokens: MinNewTokens = None
    seed: Seed = None
    stop: Stop = None
    stop_token_ids: StopTokenIds = None
    include_stop: IncludeStop = None
    skip_special_tokens: SkipSpecialTokens = None
    bad_words: BadWords = None
    repetition_penalty: RepetitionPenalty = None
    presence_penalty: PresencePenalty = None
    frequency_penalty: FrequencyPenalty = None
    ignore_eos: IgnoreEos = None
    json_schema: JsonSchema = None
    json_object: JsonObject = None
    regex: Regex = None
    grammar: Grammar = None

    def given(self) -> dict[str, Any]:
        """The options that were given, as fields of `mcsd.SamplingParams`.

        Raises:
            InvalidParameter: a value outside its range, or a file that cannot be read.
        """
        fields = {name: value for name, value in vars(self).items() if value not in (None, [])}
        if self.json_schema is not None and not self.json_schema.lstrip().startswith("{"):
            fields["json_schema"] = _text_of("json_schema", Path(self.json_schema))
        if self.grammar is not None:
            fields["grammar"] = _text_of("grammar", self.grammar)
        SamplingParams(**fields)
        return fields


def _text_of(name: str, path: Path) -> str:
    """The text of a file, at most one character longer than is allowed."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_GRAMMAR + 1)
    except (OSError, ValueError) as error:
        raise InvalidParameter(
            f"{name}: {str(path)!r:.80} cannot be read: {error!r:.80}", "give a text file"
        ) from error


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn a function into a command: its groups become single options, and ``--debug`` is added.

    Args:
        function: its parameters are annotated for typer, or with a dataclass whose fields are, or which
            `mcsd.config.option` made. Other fields of a dataclass keep their defaults.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[str]]] = {}
    for parameter in inspect.signature(function).parameters.values():
        group = parameter.annotation
        if is_dataclass(group):
            options = [f for f in fields(group) if f.metadata or get_origin(f.type) is Annotated]
            groups[parameter.name] = group, [f.name for f in options]
            parameters += [_option(f.name, _annotation(f), _default(f)) for f in options]
        else:
            parameters.append(_option(parameter.name, group, parameter.default))
    parameters.append(_option("debug", Debug, False))

    @functools.wraps(function)
    def run(debug: bool, **values: Any) -> None:
        debug_enabled.set(debug)
        with nullcontext() if debug else quiet_libraries():
            for name, (group, names) in groups.items():
                values[name] = group(**{field: values.pop(field) for field in names})
            function(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _annotation(field: Field[Any]) -> Any:
    """The typer annotation of a field."""
    if not field.metadata:
        return field.type
    of = field.metadata
    info = typer.Option(*of["flags"], help=of["help"], show_default=of["shown"], rich_help_panel=of["panel"])
    return Annotated[of["type"], info]


def _default(field: Field[Any]) -> Any:
    return inspect.Parameter.empty if field.default is MISSING else field.default
