"""The options that commands share. They have the names and the defaults that they have in Python.

A command takes a whole group of them as one parameter (`EngineOptions`, `SamplingOptions`) or picks single ones.
"""

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcsd.catalog import default_draft
from mcsd.cli.output import debugging, fetch_missing, silenced, working
from mcsd.params import SamplingParams

if TYPE_CHECKING:
    from mcsd.engine import Engine

_engine = functools.partial(typer.Option, rich_help_panel="Engine")
_sampling = functools.partial(typer.Option, rich_help_panel="Sampling")

Target = Annotated[str, _engine("--target", "-m", help="A name (see mcsd models), folder, GGUF file or hub id.")]
Draft = Annotated[
    str | None, _engine("--draft", "-md", help="The same, or ngram.", show_default="the target's own, else ngram")
]
Tree = Annotated[str, _engine("--tree", help="Candidates: 4x2x2x1, chain:4, none, auto or a JSON file.")]
Scheme = Annotated[str, _engine("--scheme", help="How candidates are drawn and judged.")]
Device = Annotated[str, _engine("--device", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, _engine("--dtype", help="auto, float32, bfloat16 or float16.")]
Quantize = Annotated[str | None, _engine("--quantize", help="Quantize the weights.", show_default="as they are")]
Compile = Annotated[bool, _engine("--compile", help="Compile the models: a slow start, then faster.")]
MaxLength = Annotated[int, _engine("--max-length", help="The most tokens of prompt and text together.")]

Temperature = Annotated[float, _sampling("--temperature", help="0 takes the likeliest token.")]
TopK = Annotated[int, _sampling("--top-k", help="Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float, _sampling("--top-p", help="Keep the likeliest tokens that hold this mass.")]
MinP = Annotated[float, _sampling("--min-p", help="Drop tokens below this share of the likeliest.")]
MaxNewTokens = Annotated[int, _sampling("--max-new-tokens", "-n", help="At most this many new tokens.")]
Seed = Annotated[int | None, _sampling("--seed", help="Makes the text repeatable.", show_default="a fresh one")]
Stop = Annotated[list[str] | None, _sampling("--stop", help="End the text before this string. Repeatable.")]
RepetitionPenalty = Annotated[float, _sampling("--repetition-penalty", help="Above 1 discourages used tokens.")]
PresencePenalty = Annotated[float, _sampling("--presence-penalty", help="Taken once from each used token's logit.")]
FrequencyPenalty = Annotated[float, _sampling("--frequency-penalty", help="Taken for each time a token was used.")]
IgnoreEos = Annotated[bool, _sampling("--ignore-eos", help="Go on after an end-of-sequence token.")]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Color = Annotated[bool, typer.Option("--color/--no-color", help="Show which tokens were drafted.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks, and what the libraries say.")]

_PARAMS = SamplingParams()


@dataclass(frozen=True)
class PairOptions:
    """Which weights, and how they are loaded, for commands that bring trees of their own."""

    target: Target = "smollm2-135m"
    draft: Draft = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    quantize: Quantize = None
    compile: Compile = False


@dataclass(frozen=True)
class EngineOptions:
    """The arguments of `mcsd.Engine.load`, in its order."""

    target: Target = "smollm2-135m"
    draft: Draft = None
    tree: Tree = "auto"
    scheme: Scheme = "mcss-wor"
    device: Device = "auto"
    dtype: Dtype = "auto"
    quantize: Quantize = None
    compile: Compile = False
    max_length: MaxLength = 2048

    def load(self, max_batch: int = 1) -> "Engine":
        """Fetch the weights that are missing, with a progress bar, and make the engine.

        Raises:
            ModelError, OptionError: see `mcsd.Engine.load`.
        """
        with working(f"loading {self.target}"):
            from mcsd.engine import Engine
            from mcsd.options import check_options

        # A wrong word is told before a gigabyte is fetched for it.
        check_options(self.scheme, self.tree, max_batch, self.max_length)
        fetch_pair(self.target, self.draft if self.tree != "none" else self.target)
        with working(f"loading {self.target}"):
            engine = Engine.load(**vars(self), max_batch=max_batch)
        with working(f"measuring {self.target} and its draft, once"):
            engine.prepare()
        return engine


def fetch_pair(target: str, draft: str | None) -> None:
    """Fetch the weights of target and draft that are missing."""
    fetch_missing(target, draft or default_draft(target))


@dataclass(frozen=True)
class SamplingOptions:
    """The arguments of `mcsd.SamplingParams` that a command line can say."""

    temperature: Temperature = _PARAMS.temperature
    top_k: TopK = _PARAMS.top_k
    top_p: TopP = _PARAMS.top_p
    min_p: MinP = _PARAMS.min_p
    max_new_tokens: MaxNewTokens = _PARAMS.max_new_tokens
    seed: Seed = _PARAMS.seed
    stop: Stop = None
    repetition_penalty: RepetitionPenalty = _PARAMS.repetition_penalty
    presence_penalty: PresencePenalty = _PARAMS.presence_penalty
    frequency_penalty: FrequencyPenalty = _PARAMS.frequency_penalty
    ignore_eos: IgnoreEos = _PARAMS.ignore_eos

    def params(self) -> SamplingParams:
        """Check the values and put them together.

        Raises:
            InvalidParameter: a value outside its range.
        """
        return SamplingParams(**{**vars(self), "stop": self.stop or ()})


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a command: its groups become single options, and ``--debug`` comes on top.

    Args:
        function: parameters are annotated for typer, or with a dataclass whose fields are.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            parameters += [_option(f.name, f.type, _default(f)) for f in fields(parameter.annotation)]
        else:
            parameters.append(_option(parameter.name, parameter.annotation, parameter.default))
    parameters.append(_option("debug", Debug, False))

    @functools.wraps(function)
    def run(debug: bool, **values: Any) -> None:
        debugging.set(debug)
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        with nullcontext() if debug else silenced():
            function(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _default(field: Field[Any]) -> Any:
    return inspect.Parameter.empty if field.default is MISSING else field.default
