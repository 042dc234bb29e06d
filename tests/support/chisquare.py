"""The output distribution of an engine against that of the target, by chi-square on blocks of three tokens.

The engine is a black box: tokens in, tokens out. The expected distribution is computed here from the table, with
transformers' own warpers for temperature, top-k, top-p and min-p.
"""

import gc
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import mcsd
from mcsd.schemes import Scheme
from mcsd.schemes.registry import REGISTRY, supports
from mcsd.testing import TabularModel

SEED = int(os.environ.get("MCSD_LAW_SEED", "0"))
"""Offset of every seed of the laws; the planted faults must be caught with any."""

START = 0

BLOCKS = 20
"""Blocks of a text."""

MAX_TEXTS = 2_000
"""Texts of one setting that run together."""


def table(vocabulary: int, seed: int, sharpness: float = 1.0) -> Tensor:
    """A random table: row 0 and 1 ordinary, row 2 with zeros, row 3 nearly one-hot, the others ordinary."""
    generator = torch.Generator().manual_seed(seed + 10_000 * SEED)
    rows = torch.rand(vocabulary, vocabulary, generator=generator, dtype=torch.float64) ** (2 * sharpness) + 0.02
    rows[2, torch.randperm(vocabulary, generator=generator)[: vocabulary // 2]] = 0.0
    rows[3] = 1e-3 / (vocabulary - 1)
    rows[3, seed % vocabulary] = 1.0
    return rows / rows.sum(-1, keepdim=True)


def runnable(*trees: str) -> list[tuple[str, str]]:
    """Every scheme with each of the trees that it supports."""
    shapes = {tree: mcsd.TreeShape.parse(tree) for tree in trees}
    return [(name, tree) for name in sorted(REGISTRY) for tree, shape in shapes.items() if supports(name, shape)]


def others_slow(cases: Iterable[tuple[Any, ...]], fast: Callable[..., bool]) -> list[Any]:
    """The cases of a test. All but the fast ones are left to ``make slow``."""
    return [case if fast(*case) else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def warped(rows: Tensor, params: mcsd.SamplingParams) -> Tensor:
    """The table after temperature, top-k, top-p and min-p, by transformers' warpers."""
    if params.temperature == 0:
        return torch.nn.functional.one_hot(rows.argmax(-1), rows.shape[1]).double()
    scores = rows.log() / params.temperature
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p > 0:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    return scores.softmax(-1)


def block_law(rows: Tensor) -> Tensor:
    """float64 ``[V, V³]``: the probability of every block of three tokens, by the token before it."""
    return torch.einsum("sa,ab,bc->sabc", rows, rows, rows).flatten(1)


def transitions(blocks: Tensor) -> Tensor:
    """``[V, V]``: how often each token followed each, from blocks as `sample` counts them."""
    size = len(blocks)
    each = blocks.view(size, size, size, size)
    return each.sum((2, 3)) + each.sum((0, 3)) + each.sum((0, 1))


def chi_square(counts: Tensor, law: Tensor) -> tuple[float, int]:
    """The statistic and its degrees of freedom; infinite if a block of probability 0 was counted.

    Each row is tested separately: given the token before it, the distribution of a block depends on the target only
    (Billingsley 1961, "Statistical methods in Markov chains"). Cells with expected counts below 5 are merged into one
    cell of their row, and if even that is too small, into its first cell.

    Args:
        counts, law: ``[S, C]``; rows of the law sum to 1.
    """
    if counts[law == 0].any():
        return float("inf"), 1
    statistic, degrees = 0.0, 0
    for seen, expected in zip(counts, counts.sum(1, keepdim=True) * law, strict=True):
        small = expected < 5
        rest = torch.stack([seen[small].sum(), expected[small].sum()])
        cells = torch.stack([seen[~small], expected[~small]], dim=1)
        if rest[1] >= 5:
            cells = torch.cat([cells, rest[None]])
        elif len(cells):
            cells[0] += rest
        statistic += float(((cells[:, 0] - cells[:, 1]) ** 2 / cells[:, 1]).sum())
        degrees += max(0, len(cells) - 1)
    return statistic, degrees


def p_value(*both: tuple[float, int]) -> float:
    """The p-value of one statistic, or of the sum of several independent ones."""
    statistic, degrees = (sum(part) for part in zip(*both, strict=True))
    return float(chi2.sf(statistic, degrees)) if degrees else 1.0


def sample(
    engine: mcsd.Engine, settings: Sequence[mcsd.SamplingParams], count: int, seed: int, blocks: int = BLOCKS
) -> list[Tensor]:
    """At least ``count`` blocks of three tokens for each of the settings, counted in the order of `block_law`.

    The settings are mixed in the same batches and every request is seeded. A text is ``blocks`` blocks long, so that
    blocks begin anywhere in a step.
    """
    size = engine.target.vocab_size
    seen = [torch.zeros(size**4, dtype=torch.float64) for _ in settings]
    texts = -(-count // blocks)
    # Millions of small objects without reference cycles: collecting them would take a third of the time.
    gc.disable()
    try:
        for start in range(0, texts, MAX_TEXTS):
            numbers = [(i, one) for i in range(start, min(start + MAX_TEXTS, texts)) for one in settings]
            first = (seed + 10_000 * SEED) * 1_000_000_007
            params = [replace(one, seed=first + i, max_new_tokens=3 * blocks) for i, one in numbers]
            done = engine.generate([[START]] * len(params), params)
            for which, counter in enumerate(seen):
                tokens = torch.tensor([one.token_ids for one in done[which :: len(settings)]])
                whole = torch.nn.functional.pad(tokens, (1, 0), value=START)
                cells = sum(whole[:, i : i + 3 * blocks : 3] * size ** (3 - i) for i in range(4))
                counter += torch.bincount(cells.flatten(), minlength=size**4)
    finally:
        gc.enable()
    return [counter.view(size, -1) for counter in seen]


def engine_of(target: Tensor, draft: Tensor, tree: str | list[int], scheme: str | Scheme) -> mcsd.Engine:
    """An engine on two tables; a `Scheme` object replaces the engine's own scheme."""
    models = TabularModel(target.float()), TabularModel(draft.float())
    if isinstance(scheme, str):
        return mcsd.Engine(*models, tree=tree, scheme=scheme, max_batch=2048, max_length=3 * BLOCKS + 8)
    engine = mcsd.Engine(*models, tree=tree, max_batch=2048, max_length=3 * BLOCKS + 8)
    engine._scheme = scheme
    return engine
