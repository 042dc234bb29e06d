"""``mcsd bench``: acceptance and speed on the user's own pair, against baselines."""

import functools
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcsd.cli.options import Json, MaxLength, PairOptions, command
from mcsd.cli.output import Gauge, columns, fetch_missing, print_json, working
from mcsd.errors import InvalidOption

if TYPE_CHECKING:
    from mcsd.bench import Results, System, Weights

TREES, SCHEMES, TEMPERATURES, BATCH_SIZES = "2x1,2x2x1,4x2x2x1", "mcss-wor", "0,1", "1"
BASELINES = "single,naive"
EACH, PAPER_EACH = 4, 6
LENGTH, PAPER_LENGTH = 64, 48
"""Of `mcsd bench`, and of ``--paper``."""

_what = functools.partial(typer.Option, rich_help_panel="Measurement")

Tuned = Annotated[str | None, typer.Option("--tuned-draft", help="Another draft, to compare with the first.")]
Out = Annotated[Path, typer.Option("--out", help="The folder for it all; run again to go on after a break.")]
Paper = Annotated[bool, _what("--paper", help="The experiments of the paper, with trees of their own.")]
Trees = Annotated[list[str] | None, _what("--trees", help="Comma-separated, or repeated.", show_default=TREES)]
Schemes = Annotated[list[str] | None, _what("--schemes", help="The same.", show_default=SCHEMES)]
Baselines = Annotated[
    list[str] | None, _what("--baselines", help="plain, single, naive, assisted.", show_default=f"plain,{BASELINES}")
]
Temperatures = Annotated[list[str] | None, _what("--temperatures", help="Of the texts.", show_default=TEMPERATURES)]
BatchSizes = Annotated[list[str] | None, _what("--batch-sizes", help="Prompts together.", show_default=BATCH_SIZES)]
Prompts = Annotated[
    list[str] | None,
    _what("--prompts", help="FILE or NAME=FILE: a prompt a line, or JSONL. Repeatable.", show_default="built-in ones"),
]
Each = Annotated[
    int | None, _what("--each", help="Prompts of each file.", show_default=f"{EACH}; {PAPER_EACH} with --paper")
]
Length = Annotated[
    int | None,
    _what("--max-new-tokens", "-n", help="Of a text, at most.", show_default=f"{LENGTH}; {PAPER_LENGTH} with --paper"),
]
Repeats = Annotated[int, _what("--repeats", help="Times that each prompt is answered.")]
Seed = Annotated[int, _what("--seed", help="Another seed is another experiment.")]


@dataclass(frozen=True)
class WeightOptions(PairOptions):
    """The arguments of `mcsd.bench.Weights`."""

    tuned: Tuned = None


@dataclass(frozen=True)
class ExperimentOptions:
    """What makes a `mcsd.bench.Experiment`, as words."""

    paper: Paper = False
    trees: Trees = None
    schemes: Schemes = None
    baselines: Baselines = None
    temperatures: Temperatures = None
    batch_sizes: BatchSizes = None
    prompts: Prompts = None
    each: Each = None
    max_new_tokens: Length = None
    repeats: Repeats = 1
    seed: Seed = 0
    max_length: MaxLength = 2048


@command
def bench(*, out: Out, weights: WeightOptions, options: ExperimentOptions, json: Json = False) -> None:
    """Measure acceptance and speed over trees, schemes, temperatures, batch sizes and baselines."""
    with working("starting"):
        from mcsd.bench import Experiment, Weights, bench
        from mcsd.bench.figures import check_matplotlib
        from mcsd.bench.plan import plan

    # What is wrong is told before weights are fetched and read.
    check_matplotlib()
    wanted = Weights(**vars(weights))
    prompts = _prompts(options)
    length = PAPER_LENGTH if options.paper else LENGTH
    systems = _systems(options, wanted)
    experiment = Experiment(
        tuple(systems),
        tuple(_numbers("temperatures", options.temperatures, TEMPERATURES, float)),
        tuple(_numbers("batch_sizes", options.batch_sizes, BATCH_SIZES, int)),
        length if options.max_new_tokens is None else options.max_new_tokens,
        options.repeats,
        options.seed,
    )
    plan(experiment, {name: len(texts) for name, texts in prompts.items()})
    fetch_missing(wanted.target, *wanted.drafts().values())
    wanted.check()
    gauge = Gauge()
    with gauge.running():
        gauge.show("reading weights")
        models = wanted.load(any(system.role == "assisted" for system in systems))
        results = bench(
            models, prompts, experiment, out, options.max_length, _about(wanted, weights, options), gauge.show
        )
    if json:
        print_json(as_object(results, out))
    else:
        print("\n".join(lines(results, out)))


def as_object(results: "Results", out: Path) -> dict[str, Any]:
    """Results as ``--json`` prints them; the names are those of the CSV tables."""
    from mcsd.bench.results import flat
    from mcsd.bench.run import REPORT
    from mcsd.bench.tables import verdict

    return {
        "verdict": verdict(results),
        "speeds": [flat(row) for row in results.speeds],
        "acceptances": [flat(row) for row in results.acceptances],
        "attentions": [flat(row) for row in results.attentions],
        "report": str(out / REPORT),
    }


def lines(results: "Results", out: Path) -> list[str]:
    """Results as people read them, a line an entry: over all prompts; the report has more."""
    from mcsd.bench.results import overall
    from mcsd.bench.run import REPORT
    from mcsd.bench.tables import acceptance_table, attention_table, speed_table, verdict

    found = ["acceptance of the first k candidates", *columns(acceptance_table(overall(results.acceptances)))]
    found += ["", "speed", *columns(speed_table(overall(results.speeds)))]
    if results.attentions:
        found += ["", "a forward of the target", *columns(attention_table(results.attentions))]
    return [*found, "", *verdict(results), str(out / REPORT)]


def _prompts(options: ExperimentOptions) -> dict[str, list[str | list[int]]]:
    from mcsd.bench.prompts import built_in, spaced
    from mcsd.distill.sources import load_prompts

    each = (PAPER_EACH if options.paper else EACH) if options.each is None else options.each
    if not 1 <= each <= 4096:
        raise InvalidOption(f"each={each} is not from 1 to 4096", "give such a number of prompts")
    texts = built_in() if options.prompts is None else {}
    for word in options.prompts or ():
        # A path may hold the sign itself.
        name, _, file = ("", "", word) if Path(word).exists() or "=" not in word else word.partition("=")
        name = name or Path(file).stem
        if name in texts:
            raise InvalidOption(f"prompts {name!r:.60} are given twice", "name them: --prompts NAME=FILE")
        texts[name] = load_prompts(Path(file))
    return {name: list(spaced(prompts, each)) for name, prompts in texts.items()}


def _systems(options: ExperimentOptions, weights: "Weights") -> list["System"]:
    from mcsd.bench import grid, paper

    tuned = weights.tuned is not None
    if not options.paper:
        trees, schemes = _words(options.trees, TREES), _words(options.schemes, SCHEMES)
        return grid(trees, schemes, _words(options.baselines, BASELINES), tuned)
    for name in ("trees", "schemes", "baselines"):
        if getattr(options, name) is not None:
            raise InvalidOption(f"--paper brings its own {name}", f"leave --{name} or --paper out")
    return paper(tuned, weights.can_assist())


def _words(given: list[str] | None, default: str) -> list[str]:
    """Single words, of options that take several; a list of parents has commas of its own."""
    words = [
        word for text in given or [default] for word in ([text] if text.startswith("parents:") else text.split(","))
    ]
    return list(dict.fromkeys(word.strip() for word in words))


def _numbers(name: str, given: list[str] | None, default: str, kind: type[float] | type[int]) -> list[Any]:
    try:
        return [kind(word) for word in _words(given, default)]
    except ValueError as error:
        raise InvalidOption(f"{name}={','.join(given or []):.60}: not all are numbers", f"such as {default}") from error


def _about(wanted: "Weights", weights: WeightOptions, options: ExperimentOptions) -> dict[str, Any]:
    """What else must be the same for a folder to go on: once loaded, weights are on this machine and can be read."""
    from mcsd.bench.manifest import digests, without_home

    names = {
        name: without_home(value) if isinstance(value, str) else value
        for name, value in {**vars(wanted), **wanted.drafts()}.items()
    }
    command = without_home(_command(weights, options))
    return {"weights": names, "digests": digests(wanted.files()), "command": command}


def _command(weights: WeightOptions, options: ExperimentOptions) -> str:
    """The command line that asks for the same, in whatever folder."""
    words = ["mcsd", "bench"]
    given = {**asdict(weights), **asdict(options)}
    defaults = {**asdict(WeightOptions()), **asdict(ExperimentOptions())}
    given["tuned_draft"], defaults["tuned_draft"] = given.pop("tuned"), defaults.pop("tuned")
    for name, value in given.items():
        if value != defaults[name]:
            option = "--" + name.replace("_", "-")
            values = value if isinstance(value, list) else [value]
            words += [option] if value is True else [word for one in values for word in (option, str(one))]
    return shlex.join(words)
