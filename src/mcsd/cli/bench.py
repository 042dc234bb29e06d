"""``mcsd bench``: acceptance and speed of a pair of models, against baselines and other programs."""

import functools
import shlex
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcsd.bench import Experiment, System, grid, paper
from mcsd.bench.grid import peer_systems
from mcsd.bench.schedule import schedule_jobs
from mcsd.cli.options import Json, command
from mcsd.cli.output import ProgressDisplay, columns, fetch_missing, print_json, spinner
from mcsd.config import EngineOptions, LoadOptions, same_option
from mcsd.errors import InvalidOption, check_int
from mcsd.prompts import benchmark_prompts, evenly_spaced, load_prompts

if TYPE_CHECKING:
    from mcsd.bench import BenchModelOptions, Results
    from mcsd.bench.tables import Table

TREES, SCHEMES, TEMPERATURES, BATCH_SIZES = "2x1,2x2x1,4x2x2x1", "mcss-wor", "0,1", "1"
BASELINES = "plain,generate"
EACH, PAPER_EACH = 4, 6
NEW_TOKENS, PAPER_NEW_TOKENS = 64, 48
"""Defaults without and with ``--paper``."""

_SPEED_NOTE = "tokens/step: new tokens per forward of the target; accepted: share of candidates that became text"

_measurement = functools.partial(typer.Option, rich_help_panel="Measurement")

Tuned = Annotated[str | None, typer.Option("--tuned-draft", help="A second draft, to compare with the first.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results. Run again to resume after an interruption.")]
Paper = Annotated[bool, _measurement("--paper", help="The experiments of the paper, with their own trees.")]
Trees = Annotated[list[str] | None, _measurement("--trees", help="Comma-separated, or repeated.", show_default=TREES)]
Schemes = Annotated[
    list[str] | None, _measurement("--schemes", help="Verification schemes, likewise.", show_default=SCHEMES)
]
Baselines = Annotated[
    list[str] | None,
    _measurement(
        "--baselines",
        help="In mcsd: plain, single, naive. In transformers: generate, lookup, assisted.",
        show_default=BASELINES,
    ),
]
Peers = Annotated[
    list[str] | None,
    _measurement("--peer", help="NAME=COMMAND: another program, see docs/bench.md. Repeatable.", show_default="none"),
]
Temperatures = Annotated[
    list[str] | None, _measurement("--temperatures", help="Comma-separated; 0 is greedy.", show_default=TEMPERATURES)
]
BatchSizes = Annotated[
    list[str] | None,
    _measurement("--batch-sizes", help="Prompts answered together, comma-separated.", show_default=BATCH_SIZES),
]
Prompts = Annotated[
    list[str] | None,
    _measurement(
        "--prompts", help="FILE or NAME=FILE: one prompt a line, or JSONL. Repeatable.", show_default="built-in ones"
    ),
]
Each = Annotated[
    int | None, _measurement("--each", help="Prompts of each file.", show_default=f"{EACH}; {PAPER_EACH} with --paper")
]
NewTokens = Annotated[
    int | None,
    _measurement(
        "--max-new-tokens",
        "-n",
        help="At most this many new tokens a text.",
        show_default=f"{NEW_TOKENS}; {PAPER_NEW_TOKENS} with --paper",
    ),
]
Repeats = Annotated[int, _measurement("--repeats", help="Requests a prompt; the median gives its speed.")]
Seed = Annotated[int, _measurement("--seed", help="Each prompt's seed derives from it.")]


@dataclass(frozen=True)
class BenchModelArguments(LoadOptions):
    """The arguments of `mcsd.bench.BenchModelOptions`."""

    tuned: Tuned = None


@dataclass(frozen=True)
class ExperimentArguments:
    """A `mcsd.bench.Experiment`, as the command line gives it."""

    paper: Paper = False
    trees: Trees = None
    schemes: Schemes = None
    baselines: Baselines = None
    peer: Peers = None
    temperatures: Temperatures = None
    batch_sizes: BatchSizes = None
    prompts: Prompts = None
    each: Each = None
    max_new_tokens: NewTokens = None
    repeats: Repeats = 1
    seed: Seed = 0
    max_length: int | None = same_option(EngineOptions, "max_length")


@command
def bench(*, out: Out, models: BenchModelArguments, options: ExperimentArguments, json: Json = False) -> None:
    """Measure acceptance and speed over trees, schemes, temperatures and batch sizes, against baselines."""
    # Errors are reported before anything large is imported, fetched or read.
    prompts = _prompts(options)
    new_tokens = PAPER_NEW_TOKENS if options.paper else NEW_TOKENS
    commands = _peers(options)
    systems = _systems(options, models, commands)
    experiment = Experiment(
        tuple(systems),
        tuple(_numbers("temperatures", options.temperatures, TEMPERATURES, float)),
        tuple(_numbers("batch_sizes", options.batch_sizes, BATCH_SIZES, int)),
        new_tokens if options.max_new_tokens is None else options.max_new_tokens,
        options.repeats,
        options.seed,
    )
    schedule_jobs(experiment, {name: len(texts) for name, texts in prompts.items()})
    fetch_missing(models.target, models.draft, models.tuned)
    with spinner("starting"):
        from mcsd.bench import BenchModelOptions, bench
        from mcsd.bench.peers import running_peers

    wanted = BenchModelOptions(**vars(models))
    fetch_missing(*wanted.drafts().values())
    wanted.check()
    display = ProgressDisplay()
    with display.running(), running_peers(commands) as peers:
        display.update("loading models")
        # Other systems answer batches of one only, so their models may not be needed.
        needed = [system for system in systems if system.in_engine or 1 in experiment.batch_sizes]
        loaded = wanted.load(needed, peers)
        provenance = _provenance(wanted, models, options)
        results = bench(loaded, prompts, experiment, out, options.max_length, provenance, display.update)
    if json:
        print_json(as_object(results, out))
    else:
        print("\n".join(lines(results, out)))


def as_object(results: "Results", out: Path) -> dict[str, Any]:
    """Results as ``--json`` prints them; the keys are the columns of the CSV tables."""
    from mcsd.bench.benchmark import REPORT
    from mcsd.bench.results import flatten
    from mcsd.bench.tables import conclusions

    return {
        "verdict": conclusions(results),
        "speeds": [flatten(row) for row in results.speeds],
        "acceptances": [flatten(row) for row in results.acceptances],
        "attentions": [flatten(row) for row in results.attentions],
        "left_out": dict(results.left_out),
        "report": str(out / REPORT),
    }


def lines(results: "Results", out: Path) -> list[str]:
    """Results over all prompts as lines of text, speed first; the report has more."""
    from mcsd.bench.benchmark import REPORT
    from mcsd.bench.results import overall
    from mcsd.bench.tables import acceptance_table, attention_table, conclusions, left_out, speed_table

    speeds = speed_table(overall(results.speeds))
    ends = "; low, high: 95 % confidence interval of × plain" if "low" in speeds.names else ""
    text = [f"speed{ends}", *_lines_of(speeds), _SPEED_NOTE, *left_out(results)]
    if results.acceptances:
        acceptances = acceptance_table(overall(results.acceptances))
        text += ["", "acceptance of one of the first k candidates", *_lines_of(acceptances)]
    if results.attentions:
        text += ["", "a forward of the target: tree mask, or a batch of paths"]
        text += _lines_of(attention_table(results.attentions))
    return [*text, "", *conclusions(results), str(out / REPORT)]


def _lines_of(table: "Table") -> list[str]:
    """A table as lines, numbers right-aligned."""
    rows = [[name.upper() for name in table.names], *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return columns(
        [
            [
                cell if column.is_text else cell.rjust(width)
                for cell, width, column in zip(row, widths, table.columns, strict=True)
            ]
            for row in rows
        ]
    )


def _prompts(options: ExperimentArguments) -> dict[str, list[str | list[int]]]:
    each = (PAPER_EACH if options.paper else EACH) if options.each is None else options.each
    check_int("each", each, 1, 4096)
    texts = benchmark_prompts() if options.prompts is None else {}
    for word in options.prompts or ():
        # A path may contain "=" itself.
        name, _, file = ("", "", word) if Path(word).exists() or "=" not in word else word.partition("=")
        name = name or Path(file).stem
        if name in texts:
            raise InvalidOption(f"prompts {name!r:.60} are given twice", "name them: --prompts NAME=FILE")
        texts[name] = load_prompts(Path(file))
    return {name: list(evenly_spaced(prompts, each)) for name, prompts in texts.items()}


def _peers(options: ExperimentArguments) -> dict[str, str]:
    """Commands of other programs, by name."""
    commands: dict[str, str] = {}
    for word in options.peer or ():
        name, _, command = word.partition("=")
        if name in commands or not (name and command.strip()):
            raise InvalidOption(
                f"peer {word!r:.60}: given twice, or not NAME=COMMAND",
                'such as --peer "llama.cpp=python llamacpp.py FILE"',
            )
        commands[name] = command
    return commands


def _systems(options: ExperimentArguments, models: BenchModelArguments, peers: Collection[str]) -> list[System]:
    tuned = models.tuned is not None
    if not options.paper:
        trees, schemes = _words(options.trees, TREES), _words(options.schemes, SCHEMES)
        return grid(trees, schemes, _words(options.baselines, BASELINES), tuned, peers)
    for name in ("trees", "schemes", "baselines"):
        if getattr(options, name) is not None:
            raise InvalidOption(f"--paper brings its own {name}", f"leave --{name} or --paper out")
    from mcsd.bench import BenchModelOptions

    systems = paper(tuned, BenchModelOptions(**vars(models)).can_assist())
    return [*systems, *peer_systems(peers, systems)]


def _words(given: list[str] | None, default: str) -> list[str]:
    """The comma-separated values of an option that may be repeated; a list of parents has commas of its own."""
    words = [
        word for text in given or [default] for word in ([text] if text.startswith("parents:") else text.split(","))
    ]
    return list(dict.fromkeys(word.strip() for word in words))


def _numbers(name: str, given: list[str] | None, default: str, kind: type[float] | type[int]) -> list[Any]:
    try:
        return [kind(word) for word in _words(given, default)]
    except ValueError as error:
        raise InvalidOption(f"{name}={','.join(given or []):.60}: not all are numbers", f"such as {default}") from error


def _provenance(
    wanted: "BenchModelOptions", models: BenchModelArguments, options: ExperimentArguments
) -> dict[str, Any]:
    """What else must be the same to resume: models and the command. Called when weights are on this machine."""
    from mcsd.bench.manifest import digests, without_home

    names = {
        name: without_home(value) if isinstance(value, str) else value
        for name, value in {**vars(wanted), **wanted.drafts()}.items()
    }
    command = without_home(_command(models, options))
    return {"weights": names, "digests": digests(wanted.files()), "command": command}


def _command(models: BenchModelArguments, options: ExperimentArguments) -> str:
    """The command line that repeats an experiment, without ``--out``."""
    words = ["mcsd", "bench"]
    given = {**asdict(models), **asdict(options)}
    defaults = {**asdict(BenchModelArguments()), **asdict(ExperimentArguments())}
    given["tuned_draft"], defaults["tuned_draft"] = given.pop("tuned"), defaults.pop("tuned")
    for name, value in given.items():
        if value != defaults[name]:
            option = "--" + name.replace("_", "-")
            values = value if isinstance(value, list) else [value]
            words += [option] if value is True else [word for one in values for word in (option, str(one))]
    return shlex.join(words)
