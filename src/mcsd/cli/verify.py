"""``mcsd verify``: check that an engine says what its target says."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcsd.cli.options import (
    EngineOptions,
    FrequencyPenalty,
    Json,
    MaxLength,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    command,
)
from mcsd.cli.output import Gauge, columns, harmless, print_json, working
from mcsd.params import SamplingParams

if TYPE_CHECKING:
    from mcsd.verify.report import Context, Divergence, Report

_ROWS = 32
"""Sequences that the engine runs together: samples are many and short."""

_SHOWN = 10
"""Divergences in the table, the widest first."""

_how = functools.partial(typer.Option, rich_help_panel="Verification")

CheckedTree = Annotated[
    str,
    typer.Option(
        "--tree", help="Candidates to check: 4x2x2x1, chain:4, ...", show_default="2x2x1", rich_help_panel="Engine"
    ),
]
Prompts = Annotated[
    Path | None, _how("--prompts", help="A prompt a line, or JSONL.", show_default="eight built-in ones")
]
Contexts = Annotated[int, _how("--contexts", help="Places in a text where samples are drawn.")]
Samples = Annotated[int, _how("--samples", help="Pairs of tokens that are drawn at each.")]
Minutes = Annotated[float, _how("--minutes", help="For all of it; where they are too few, less is done.")]
Length = Annotated[int, _how("--max-new-tokens", "-n", help="Of a greedy text, at most.")]
Seed = Annotated[int, _how("--seed", help="Another seed is another sample.")]


@dataclass(frozen=True)
class SmallEngineOptions(EngineOptions):
    """As for the other commands, but many short sequences run together, and auto is a tree with candidates."""

    tree: CheckedTree = "auto"
    max_length: MaxLength = 512


@dataclass(frozen=True)
class LawOptions:
    """What of `mcsd.SamplingParams` makes the law."""

    temperature: Temperature = 1.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: PresencePenalty = 0.0
    frequency_penalty: FrequencyPenalty = 0.0
    max_new_tokens: Length = 64
    seed: Seed = 0


@command
def verify(
    *,
    engine: SmallEngineOptions,
    sampling: LawOptions,
    prompts: Prompts = None,
    contexts: Contexts = 8,
    samples: Samples = 2000,
    minutes: Minutes = 10.0,
    json: Json = False,
) -> None:
    """Check that an engine says what its target says: greedy texts, and samples against the exact law."""
    params = SamplingParams(**vars(sampling))
    with working("starting"):
        from mcsd.distill.sources import load_prompts
        from mcsd.verify import Options, check_params, tree_for, verify

    options = Options(contexts, samples, minutes)
    check_params(params)
    given = None if prompts is None else load_prompts(prompts)
    if engine.tree == "auto":
        engine = replace(engine, tree=tree_for(engine.scheme))
    loaded = engine.load(_ROWS)
    gauge = Gauge()
    with gauge.running():
        report = verify(loaded, given, params, options, gauge.show)
    try:
        if json:
            print_json(as_object(report))
        else:
            print("\n".join(lines(report, loaded.tokenizer.decode if loaded.tokenizer else str)))
    finally:
        # Whether or not anybody still reads the report.
        if not report.passed:
            raise typer.Exit(1)


def as_object(report: "Report") -> dict[str, Any]:
    """A report as ``--json`` prints it. Infinite gaps, of impossible tokens, are null."""
    value = asdict(report) | {"passed": report.passed}
    for part in ("greedy", "sampled"):
        value[part]["passed"] = getattr(report, part).passed
    for one in value["greedy"]["divergences"]:
        one["tie"] = one["gap"] <= report.greedy.rounding
        one["gap"] = one["gap"] if isfinite(one["gap"]) else None
    return value


def lines(report: "Report", decode: Callable[[list[int]], str]) -> list[str]:
    """A report as people read it, a line an entry.

    Args:
        report: what was found.
        decode: token ids to text.
    """
    head = f"target {report.target} ({report.dtype}), draft {report.draft}, tree {report.tree}, scheme {report.scheme}"
    passed = "passed" if report.passed else "FAILED"
    return [head, "", *_greedy(report, decode), "", *_sampled(report), "", f"{passed} in {report.seconds:.0f} s"]


def _greedy(report: "Report", decode: Callable[[list[int]], str]) -> list[str]:
    greedy = report.greedy
    failed, diverged = len(greedy.failures), len(greedy.divergences)
    out = [
        f"greedy: {'passed' if greedy.passed else 'FAILED'}. {greedy.texts} of {greedy.asked} texts, {greedy.tokens} "
        f"tokens: {diverged - failed} ties with the target's likeliest token, {failed} other differences",
        f"  the gap of two logits moved by up to {greedy.rounding:.2g} with the shape of a forward: "
        "the likeliest token ties with those that are as near",
    ]
    if diverged:
        head = ("PROMPT", "TOKEN", "ENGINE", "TARGET", "GAP", "")
        widest = sorted(greedy.divergences, key=lambda one: one.gap, reverse=True)[:_SHOWN]
        out += _table([head, *(_divergence(one, greedy.rounding, decode) for one in widest)])
    if diverged > _SHOWN:
        out.append(f"  and {diverged - _SHOWN} with smaller gaps")
    return out


def _divergence(one: "Divergence", tie: float, decode: Callable[[list[int]], str]) -> tuple[str, ...]:
    said, best = (harmless(repr(decode([token]))) for token in (one.token, one.best))
    verdict = "tie" if one.gap <= tie else "DIFFERENT"
    return str(one.prompt + 1), str(one.position + 1), said, best, f"{one.gap:.3g}", verdict


def _sampled(report: "Report") -> list[str]:
    sampled = report.sampled
    done = min(one.samples for one in sampled.contexts)
    head = ("PROMPT", "TOKENS", "CELLS", "CHI2", "P", "TV", "PLAIN SAMPLING", "ROUNDING", "SEES", "")
    rows = [_context(*both) for both in zip(sampled.contexts, sampled.rejected, strict=False)]
    degrees = sum(one.cells - 1 for one in sampled.contexts)
    everything = f"{sum(one.chi_square for one in sampled.contexts):.1f}", f"{sampled.p_value:.2g}"
    last = _verdict(sampled.rejected[-1])
    together = ("all", "", str(degrees + 1), *everything, "", "", "", _number(sampled.sees), last)
    allowed = max(one.rounding for one in sampled.contexts)
    return [
        f"sampled: {'passed' if sampled.passed else 'FAILED'}. {len(sampled.contexts)} of {sampled.asked} contexts, "
        f"{done} of {sampled.asked_samples} pairs of tokens at each",
        *_table([head, *rows, together]),
        f"  a lossless engine fails this once in a thousand seeds; rounding moved the law by up to {allowed:.2g} (TV), "
        "which is allowed for",
        f"  a TV from the law of {_number(sampled.sees)} at all contexts, or of SEES at one, would be found nine times "
        "out of ten",
    ]


def _context(one: "Context", rejected: bool) -> tuple[str, ...]:
    place = str(one.prompt + 1) + (f"+{one.continued}" if one.continued else "")
    forbidden = f" ({one.forbidden} forbidden)" if one.forbidden else ""
    low, _, high = one.plain
    return (
        *(place, str(one.tokens), str(one.cells), f"{one.chi_square:.1f}", f"{one.p_value:.2g}"),
        *(f"{one.total_variation:.3f}", f"{low:.3f} - {high:.3f}", f"{one.rounding:.1g}", _number(one.sees)),
        _verdict(rejected) + forbidden,
    )


def _verdict(rejected: bool) -> str:
    return "DIFFERENT" if rejected else "same"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [f"  {line}" for line in columns(rows)]
