"""``mcsd tune``: find the tree that pays on this machine, and let ``--tree auto`` know."""

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcsd.cli.options import Json, MaxLength, PairOptions, Scheme, command, fetch_pair
from mcsd.cli.output import Gauge, columns, print_json, working

if TYPE_CHECKING:
    from mcsd.tune.report import Contender, Race, Report

_how = functools.partial(typer.Option, rich_help_panel="Tuning")

Prompts = Annotated[
    Path | None, _how("--prompts", help="A prompt a line, or JSONL.", show_default="eight built-in ones")
]
Minutes = Annotated[float, _how("--minutes", help="For all of it; a run that is broken off is gone on with.")]


@dataclass(frozen=True)
class TuneOptions(PairOptions):
    """The arguments of `mcsd.tune.Options`."""

    scheme: Scheme = "mcss-wor"
    max_length: MaxLength = 2048
    minutes: Minutes = 10.0


@command
def tune(*, options: TuneOptions, prompts: Prompts = None, json: Json = False) -> None:
    """Find the tree that pays on this machine, and let --tree auto know."""
    with working("starting"):
        from mcsd.distill.sources import load_prompts
        from mcsd.tune import Options, tune

    wanted = Options(**vars(options))
    given = None if prompts is None else load_prompts(prompts)
    fetch_pair(options.target, options.draft)
    gauge = Gauge()
    with gauge.running():
        report = tune(wanted, given, gauge.show)
    if json:
        print_json({**asdict(report), "profile": str(report.profile)})
    else:
        print("\n".join(lines(report)))


def lines(report: "Report") -> list[str]:
    """A report as people read it, a line an entry."""
    head = f"target {report.target}, draft {report.draft}, scheme {report.scheme}"
    out = [head, "", *_costs(report)]
    for race in report.races:
        out += ["", *_race(race)]
    return [*out, "", *(_verdict(race) for race in report.races), f"kept in {report.profile}"]


def _costs(report: "Report") -> Iterator[str]:
    costs = report.costs
    yield "a forward of the target, milliseconds by tokens: " + _curve(costs.target)
    if costs.level:
        yield f"drafting a level, by nodes: {_curve(costs.level)}; the first level {1e3 * costs.first:.1f} more"
    yield f"all else in a step: {1e3 * costs.plain:.1f} without candidates, {1e3 * costs.judged:.1f} with them"


def _curve(curve: tuple[tuple[int, float], ...]) -> str:
    return ", ".join(f"{tokens}: {1e3 * seconds:.1f}" for tokens, seconds in curve)


def _race(race: "Race") -> list[str]:
    rates = ", ".join(f"{rate:.2f}" for rate in race.rates)
    prompts = f"{race.prompts} prompts" if race.prompts > 1 else "one prompt"
    head = ("SCHEME", "TREE", "TOKENS/S", "PREDICTED", "X PLAIN", "BY PROMPT", "TOKENS A CALL")
    return [
        f"temperature {race.temperature:g}, {prompts}; the first, second, ... candidate is accepted: {rates}",
        *(f"  {line}" for line in columns([head, *(_contender(one) for one in race.contenders)])),
    ]


def _contender(one: "Contender") -> tuple[str, ...]:
    return (
        *(one.scheme if one.tree != "none" else "", one.tree, f"{one.measured:.2f}", f"{one.predicted:.2f}"),
        *(f"{one.times:.2f}", f"{one.slowest:.2f} - {one.fastest:.2f}", f"{one.acceptance_length:.2f}"),
    )


def _verdict(race: "Race") -> str:
    best = race.winner()
    where = f"at temperature {race.temperature:g}:"
    if best.tree == "none":
        nearest = max(race.contenders[1:], key=lambda one: one.measured)
        return f"{where} decode plainly; the best tree, {nearest.tree}, is {nearest.times:.2f} times as fast"
    return (
        f"{where} --scheme {best.scheme} --tree {best.tree}, {best.times:.2f} times as fast as plain decoding, "
        f"for {best.acceptance_length:.2f} tokens a call"
    )
