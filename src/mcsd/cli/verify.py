"""``mcsd verify``: check that an engine's output follows its target."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcsd.cli.options import (
    FrequencyPenalty,
    Json,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    TypicalP,
    command,
    load_engine,
)
from mcsd.cli.output import ProgressDisplay, columns, escape_control_characters, print_json, spinner
from mcsd.config import EngineOptions, Tree, option
from mcsd.params import SamplingParams
from mcsd.prompts import load_prompts
from mcsd.verify import VerifyOptions, check_params, default_tree

if TYPE_CHECKING:
    from mcsd.verify.report import ContextReport, Divergence, VerificationReport

_SHOWN = 10
"""Divergences shown in the table, those with the largest gaps."""

_verification = functools.partial(typer.Option, rich_help_panel="Verification")

Prompts = Annotated[
    Path | None,
    _verification(
        "--prompts", help="Text file with one prompt per line, or JSONL.", show_default="eight built-in ones"
    ),
]
Contexts = Annotated[int, _verification("--contexts", help="Number of contexts to sample at.")]
Samples = Annotated[int, _verification("--samples", help="Pairs of tokens to sample per context.")]
Minutes = Annotated[float, _verification("--minutes", help="Time limit; if it is too short, less is checked.")]
Length = Annotated[int, _verification("--max-new-tokens", "-n", help="Maximum length of a greedy text.")]
Seed = Annotated[int, _verification("--seed", help="Random seed of the samples.")]


@dataclass(frozen=True)
class VerifyEngineOptions(EngineOptions):
    """As for the other commands, but for many short sequences, and with a tree that always has candidates."""

    tree: Tree = option("auto", "--tree", help="Tree of candidates: 4x2x2x1, chain:4, ...", shown="2x2x1")
    max_batch: int = 32
    max_length: int | None = option(512, "--max-length", help="Maximum number of tokens, prompt included.", type=int)
    sampling_defaults: str = "mcsd"


@dataclass(frozen=True)
class DistributionArguments:
    """The arguments of `mcsd.SamplingParams` that define the distribution to test."""

    temperature: Temperature = 1.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    typical_p: TypicalP = 1.0
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: PresencePenalty = 0.0
    frequency_penalty: FrequencyPenalty = 0.0
    max_new_tokens: Length = 64
    seed: Seed = 0


@command
def verify(
    *,
    engine: VerifyEngineOptions,
    sampling: DistributionArguments,
    prompts: Prompts = None,
    contexts: Contexts = 8,
    samples: Samples = 2000,
    minutes: Minutes = 10.0,
    json: Json = False,
) -> None:
    """Check that an engine's output follows its target: greedy texts token by token, samples by a chi-square test."""
    params = SamplingParams(**vars(sampling))
    options = VerifyOptions(contexts, samples, minutes)
    check_params(params)
    given = None if prompts is None else load_prompts(prompts)
    if engine.tree == "auto":
        engine = replace(engine, tree=default_tree(engine.scheme))
    loaded = load_engine(engine)
    with spinner("starting"):
        from mcsd.verify import verify
    display = ProgressDisplay()
    with display.running():
        report = verify(loaded, given, params, options, display.update)
    try:
        if json:
            print_json(report_json(report))
        else:
            print("\n".join(report_lines(report, loaded.tokenizer.decode if loaded.tokenizer else str)))
    finally:
        # Also if writing the report fails, as into a closed pipe.
        if not report.passed:
            raise typer.Exit(1)


def report_json(report: "VerificationReport") -> dict[str, Any]:
    """A report as ``--json`` prints it. Infinite gaps, of tokens with probability 0, are null."""
    value = asdict(report) | {"passed": report.passed}
    for part in ("greedy", "sampled"):
        value[part]["passed"] = getattr(report, part).passed
    for one in value["greedy"]["divergences"]:
        one["tie"] = one["gap"] <= report.greedy.rounding
        one["gap"] = one["gap"] if isfinite(one["gap"]) else None
    return value


def report_lines(report: "VerificationReport", decode: Callable[[list[int]], str]) -> list[str]:
    """A report as a readable text, line by line.

    Args:
        report: the result.
        decode: token ids to text.
    """
    head = f"target {report.target} ({report.dtype}), draft {report.draft}, tree {report.tree}, scheme {report.scheme}"
    passed = "passed" if report.passed else "FAILED"
    return [head, "", *_greedy(report, decode), "", *_sampled(report), "", f"{passed} in {report.seconds:.0f} s"]


def _greedy(report: "VerificationReport", decode: Callable[[list[int]], str]) -> list[str]:
    greedy = report.greedy
    failed, diverged = len(greedy.failures), len(greedy.divergences)
    out = [
        f"greedy: {'passed' if greedy.passed else 'FAILED'}. {greedy.texts} of {greedy.asked} texts, {greedy.tokens} "
        f"tokens: {diverged - failed} ties with the target's most probable token, {failed} other differences",
        f"  the gap of two logits changed by up to {greedy.rounding:.2g} with the shape of a forward: "
        "tokens with a gap up to this tie with the most probable one",
    ]
    if diverged:
        head = ("PROMPT", "TOKEN", "ENGINE", "TARGET", "GAP", "")
        largest = sorted(greedy.divergences, key=lambda one: one.gap, reverse=True)[:_SHOWN]
        out += _table([head, *(_divergence_row(one, greedy.rounding, decode) for one in largest)])
    if diverged > _SHOWN:
        out.append(f"  and {diverged - _SHOWN} with smaller gaps")
    return out


def _divergence_row(one: "Divergence", tie: float, decode: Callable[[list[int]], str]) -> tuple[str, ...]:
    token, best = (escape_control_characters(repr(decode([token]))) for token in (one.token, one.best))
    result = "tie" if one.gap <= tie else "DIFFERENT"
    return str(one.prompt + 1), str(one.position + 1), token, best, f"{one.gap:.3g}", result


def _sampled(report: "VerificationReport") -> list[str]:
    sampled = report.sampled
    done = min(one.samples for one in sampled.contexts)
    head = ("PROMPT", "TOKENS", "CELLS", "CHI2", "P", "TV", "SAMPLING NOISE", "ROUNDING", "SEES", "")
    rows = [_context_row(*both) for both in zip(sampled.contexts, sampled.rejected, strict=False)]
    degrees = sum(one.cells - 1 for one in sampled.contexts)
    everything = f"{sum(one.chi_square for one in sampled.contexts):.1f}", f"{sampled.p_value:.2g}"
    last = _result(sampled.rejected[-1])
    together = ("all", "", str(degrees + 1), *everything, "", "", "", _number(sampled.sees), last)
    allowed = max(one.rounding for one in sampled.contexts)
    return [
        f"sampled: {'passed' if sampled.passed else 'FAILED'}. {len(sampled.contexts)} of {sampled.asked} contexts, "
        f"{done} of {sampled.asked_samples} pairs of tokens at each",
        *_table([head, *rows, together]),
        "  a lossless engine fails this with one seed in a thousand; rounding changed the "
        f"distribution by up to {allowed:.2g} (TV), which is allowed for",
        f"  a TV of {_number(sampled.sees)} from the target's distribution at all contexts, or of SEES at one, would "
        "be detected nine times out of ten",
    ]


def _context_row(one: "ContextReport", rejected: bool) -> tuple[str, ...]:
    place = str(one.prompt + 1) + (f"+{one.continued}" if one.continued else "")
    forbidden = f" ({one.forbidden} forbidden)" if one.forbidden else ""
    low, _, high = one.plain
    return (
        *(place, str(one.tokens), str(one.cells), f"{one.chi_square:.1f}", f"{one.p_value:.2g}"),
        *(f"{one.total_variation:.3f}", f"{low:.3f} - {high:.3f}", f"{one.rounding:.1g}", _number(one.sees)),
        _result(rejected) + forbidden,
    )


def _result(rejected: bool) -> str:
    return "DIFFERENT" if rejected else "same"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [f"  {line}" for line in columns(rows)]
