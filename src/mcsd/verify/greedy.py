"""Greedy texts: every token that the engine says must be the target's own argmax, or tie with it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mcsd.engine import Engine
from mcsd.params import SamplingParams
from mcsd.verify.plain import in_other_shapes, plain_logits, shaped
from mcsd.verify.report import Divergence, Greedy

_GROUP = 8
"""Texts that are written together; the clock is looked at between groups."""


def check_greedy(
    engine: Engine, prompts: Sequence[list[int]], params: SamplingParams, until: float, show: Callable[[str], None]
) -> tuple[Greedy, list[list[int]]]:
    """Write texts at temperature 0, then teacher-force the target with them: one plain forward a text.

    Args:
        engine: to be checked.
        prompts: token ids.
        params: how to write; the temperature is taken as 0.
        until: when to stop, by `time.monotonic`; the first group is done in any case.
        show: takes a line about how far it has come.

    Returns:
        What was found, and the new texts of the prompts that were done.
    """
    params = replace(params, temperature=0.0)
    texts: list[list[int]] = []
    divergences: list[Divergence] = []
    rounding = 0.0
    for start in range(0, len(prompts), _GROUP):
        if start and time.monotonic() > until:
            break
        show(f"greedy: {start} of {len(prompts)} texts")
        group = list(prompts[start : start + _GROUP])
        for prompt, done in zip(group, engine.generate(group, params), strict=True):
            text = list(done.token_ids)
            best, gaps, moved = _force(engine, prompt, text, params)
            rounding = max(rounding, moved)
            divergences += [
                Divergence(len(texts), i, token, top, gap)
                for i, (token, top, gap) in enumerate(zip(text, best, gaps, strict=True))
                if token != top
            ]
            texts.append(text)
    tokens = sum(map(len, texts))
    return Greedy(len(texts), tokens, len(prompts), tuple(divergences), rounding), texts


def _force(
    engine: Engine, prompt: list[int], text: list[int], params: SamplingParams
) -> tuple[list[int], list[float], float]:
    """The argmax at each token of a text and its lead over the token; and the most that rounding moves a lead."""
    tokens = torch.tensor([[*prompt, *text[:-1]]], device=engine.target.device)
    before = [text[:i] for i in range(len(text))]
    logits = shaped(plain_logits(engine.target, tokens, len(text))[0], params, prompt, before)
    top = logits.topk(2, dim=-1)
    moved = 0.0
    for again in in_other_shapes(engine.target, tokens, len(text)):
        moved = max(moved, _moved(shaped(again[0], params, prompt, before).gather(1, top.indices), top.values))
    best = logits.max(-1)
    said = logits.gather(1, torch.tensor(text, device=logits.device)[:, None])[:, 0]
    return best.indices.tolist(), (best.values - said).tolist(), moved


def _moved(again: Tensor, top: Tensor) -> float:
    """The most that the lead of the likeliest token over the next one moved; of two logits a position, ``[n, 2]``."""
    change = (again.diff(dim=-1) - top.diff(dim=-1)).abs()
    # Where only one token is possible the lead is infinite, and stays so.
    return float(change.nan_to_num(0.0, posinf=float("inf")).max())
