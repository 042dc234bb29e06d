"""``mcsd tune``: find the fastest tree on this machine, for ``--tree auto``."""

import functools
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcsd.cli.options import Json, command, fetch_pair
from mcsd.cli.output import ProgressDisplay, columns, print_json, spinner
from mcsd.prompts import load_prompts
from mcsd.tune.options import TuneOptions

if TYPE_CHECKING:
    from mcsd.tune.report import ConfigurationComparison, ConfigurationResult, TuneReport

_tuning = functools.partial(typer.Option, rich_help_panel="Tuning")

Prompts = Annotated[
    Path | None, _tuning("--prompts", help="One prompt a line, or JSONL.", show_default="eight built-in ones")
]


@command
def tune(*, options: TuneOptions, prompts: Prompts = None, json: Json = False) -> None:
    """Find the fastest tree on this machine, for --tree auto."""
    given = None if prompts is None else load_prompts(prompts)
    fetch_pair(options.target, options.draft)
    with spinner("starting"):
        from mcsd.tune import tune
    display = ProgressDisplay()
    with display.running():
        report = tune(options, given, display.update)
    if json:
        print_json({**asdict(report), "profile": str(report.profile)})
    else:
        print("\n".join(lines(report)))


def lines(report: "TuneReport") -> list[str]:
    """A report as lines of text."""
    head = f"target {report.target}, draft {report.draft}, scheme {report.scheme}"
    out = [head, "", *_costs(report)]
    for comparison in report.comparisons:
        out += ["", *_table(comparison)]
    return [*out, "", *(_conclusion(comparison) for comparison in report.comparisons), f"kept in {report.profile}"]


def _costs(report: "TuneReport") -> Iterator[str]:
    costs = report.costs
    yield "a forward of the target, milliseconds by tokens: " + _curve(costs.target)
    if costs.level:
        yield f"drafting a level, by nodes: {_curve(costs.level)}; the first level {1e3 * costs.first:.1f} more"
    yield f"all else in a step: {1e3 * costs.plain:.1f} without candidates, {1e3 * costs.verified:.1f} with them"


def _curve(curve: tuple[tuple[int, float], ...]) -> str:
    return ", ".join(f"{tokens}: {1e3 * seconds:.1f}" for tokens, seconds in curve)


def _table(comparison: "ConfigurationComparison") -> list[str]:
    rates = ", ".join(f"{rate:.2f}" for rate in comparison.rates)
    prompts = f"{comparison.prompts} prompts" if comparison.prompts > 1 else "one prompt"
    head = ("SCHEME", "TREE", "TOKENS/S", "PREDICTED", "X PLAIN", "BY PROMPT", "TOKENS A CALL")
    return [
        f"temperature {comparison.temperature:g}, {prompts}; the first, second, ... candidate is accepted: {rates}",
        *(f"  {line}" for line in columns([head, *(_row(one) for one in comparison.configurations)])),
    ]


def _row(one: "ConfigurationResult") -> tuple[str, ...]:
    return (
        *(one.scheme if one.tree != "none" else "", one.tree, f"{one.measured:.2f}", f"{one.predicted:.2f}"),
        *(f"{one.times:.2f}", f"{one.slowest:.2f} - {one.fastest:.2f}", f"{one.acceptance_length:.2f}"),
    )


def _conclusion(comparison: "ConfigurationComparison") -> str:
    best = comparison.best()
    where = f"at temperature {comparison.temperature:g}:"
    if best.tree == "none":
        nearest = max(comparison.configurations[1:], key=lambda one: one.measured)
        return f"{where} decode plainly; the best tree, {nearest.tree}, is {nearest.times:.2f} times as fast"
    return (
        f"{where} --scheme {best.scheme} --tree {best.tree}, {best.times:.2f} times as fast as plain decoding, "
        f"for {best.acceptance_length:.2f} tokens a call"
    )
