"""Greedy texts: every token of the engine must be the target's argmax, or tie with it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mcsd.engine import Engine
from mcsd.params import SamplingParams
from mcsd.verify.oracle import adjusted_logits, recomputed_logits, reference_logits
from mcsd.verify.report import Divergence, GreedyReport

_BATCH = 8
"""Texts generated together; the time limit is checked between batches."""


def check_greedy(
    engine: Engine, prompts: Sequence[list[int]], params: SamplingParams, until: float, progress: Callable[[str], None]
) -> tuple[GreedyReport, list[list[int]]]:
    """Generate texts at temperature 0 and teacher-force the target with them, in one plain forward per text.

    Args:
        engine: the engine to check.
        prompts: token ids.
        params: how to generate; the temperature counts as 0.
        until: time limit, by `time.monotonic`; the first batch is checked in any case.
        progress: called with status lines.

    Returns:
        The report, and the new texts of the prompts that were checked.
    """
    params = replace(params, temperature=0.0)
    texts: list[list[int]] = []
    divergences: list[Divergence] = []
    rounding = 0.0
    for start in range(0, len(prompts), _BATCH):
        if start and time.monotonic() > until:
            break
        progress(f"greedy: {start} of {len(prompts)} texts")
        batch = list(prompts[start : start + _BATCH])
        for prompt, done in zip(batch, engine.generate(batch, params), strict=True):
            text = list(done.token_ids)
            best, gaps, change = _teacher_force(engine, prompt, text, params)
            rounding = max(rounding, change)
            divergences += [
                Divergence(len(texts), i, token, top, gap)
                for i, (token, top, gap) in enumerate(zip(text, best, gaps, strict=True))
                if token != top
            ]
            texts.append(text)
    tokens = sum(map(len, texts))
    return GreedyReport(len(texts), tokens, len(prompts), tuple(divergences), rounding), texts


def _teacher_force(
    engine: Engine, prompt: list[int], text: list[int], params: SamplingParams
) -> tuple[list[int], list[float], float]:
    """Per token of a text, the argmax and its gap to the token; and the largest change of a gap by rounding."""
    tokens = torch.tensor([[*prompt, *text[:-1]]], device=engine.target.device)
    before = [text[:i] for i in range(len(text))]
    logits = adjusted_logits(reference_logits(engine.target, tokens, len(text))[0], params, prompt, before)
    top = logits.topk(2, dim=-1)
    change = 0.0
    for again in recomputed_logits(engine.target, tokens, len(text)):
        recomputed = adjusted_logits(again[0], params, prompt, before).gather(1, top.indices)
        change = max(change, _gap_change(recomputed, top.values))
    best = logits.max(-1)
    chosen = logits.gather(1, torch.tensor(text, device=logits.device)[:, None])[:, 0]
    return best.indices.tolist(), (best.values - chosen).tolist(), change


def _gap_change(recomputed: Tensor, top: Tensor) -> float:
    """The largest change of the gap between the two largest logits of a position, ``[n, 2]``."""
    change = (recomputed.diff(dim=-1) - top.diff(dim=-1)).abs()
    # If only one token is possible, both gaps are infinite: no change.
    return float(change.nan_to_num(0.0, posinf=float("inf")).max())
