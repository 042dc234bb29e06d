"""The law of a whole engine against the law of the target, by chi-square on whole sequences.

The engine is seen from outside only: tokens in, tokens out. The expected law is computed here from the table, with
transformers' own warpers for temperature, top-k, top-p and min-p.
"""

import gc
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from scipy.stats import chi2
from torch import Tensor
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import mcsd
from mcsd.schemes import Scheme
from mcsd.testing import TabularModel

SEED = int(os.environ.get("MCSD_LAW_SEED", "0"))
"""Moves every seed of the laws; the planted faults must be caught whatever it is."""

START = 0
PORTION = 10_000


def table(vocabulary: int, seed: int, sharpness: float = 1.0) -> Tensor:
    """A random table: row 0 and 1 ordinary, row 2 with zeros, row 3 nearly one-hot, the others ordinary."""
    generator = torch.Generator().manual_seed(seed + 10_000 * SEED)
    rows = torch.rand(vocabulary, vocabulary, generator=generator, dtype=torch.float64) ** (2 * sharpness) + 0.02
    rows[2, torch.randperm(vocabulary, generator=generator)[: vocabulary // 2]] = 0.0
    rows[3] = 1e-3 / (vocabulary - 1)
    rows[3, seed % vocabulary] = 1.0
    return rows / rows.sum(-1, keepdim=True)


def runnable(*trees: str) -> list[tuple[str, str]]:
    """Every scheme with each of the trees that it can judge."""
    shapes = {tree: mcsd.TreeShape.parse(tree) for tree in trees}
    return [
        (name, tree)
        for name, scheme in sorted(mcsd.SCHEMES.items())
        for tree, shape in shapes.items()
        if scheme.widest is None or shape.children.shape[1] <= scheme.widest
    ]


def warped(rows: Tensor, params: mcsd.SamplingParams) -> Tensor:
    """The table that a sampler with these parameters follows, by transformers' warpers."""
    scores = rows.log() / params.temperature
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p > 0:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    return scores.softmax(-1)


def sequence_law(rows: Tensor, length: int) -> dict[tuple[int, ...], float]:
    """Probability of every sequence of ``length`` tokens after `START`."""
    law: dict[tuple[int, ...], float] = {}
    for sequence in product(range(len(rows)), repeat=length):
        steps = zip((START, *sequence), sequence, strict=False)
        law[sequence] = float(np.prod([float(rows[a, b]) for a, b in steps]))
    return law


def p_value(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """Chi-square of the counts against the law; cells expected fewer than 5 times are one cell.

    A sequence that the law forbids has the p-value 0.
    """
    total = sum(counts.values())
    if any(law.get(sequence, 0.0) == 0.0 for sequence in counts):
        return 0.0
    cells = [(counts[sequence], probability * total) for sequence, probability in law.items() if probability > 0]
    large = [cell for cell in cells if cell[1] >= 5]
    small = [cell for cell in cells if cell[1] < 5]
    if small and sum(expected for _, expected in small) >= 1:
        large.append((sum(seen for seen, _ in small), sum(expected for _, expected in small)))
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in large)
    return float(chi2.sf(statistic, len(large) - 1))


def sample(
    engine: mcsd.Engine, settings: Sequence[mcsd.SamplingParams], count: int, seed: int
) -> list[Counter[tuple[int, ...]]]:
    """``count`` sequences for each of the settings, all settings mixed in the same batches, every request seeded."""
    seen: list[Counter[tuple[int, ...]]] = [Counter() for _ in settings]
    # Millions of small objects without a cycle among them: looking for cycles would take a third of the time.
    gc.disable()
    try:
        for start in range(0, count, PORTION):
            numbers = [(i, one) for i in range(start, min(start + PORTION, count)) for one in settings]
            params = [replace(one, seed=(seed + 10_000 * SEED) * 1_000_000_007 + i) for i, one in numbers]
            done = engine.generate([[START]] * len(params), params)
            for which, counter in enumerate(seen):
                counter.update(completion.token_ids for completion in done[which :: len(settings)])
    finally:
        gc.enable()
    return seen


def engine_of(target: Tensor, draft: Tensor, tree: str | list[int], scheme: str | Scheme) -> mcsd.Engine:
    """An engine on two tables; a scheme that is not in `mcsd.SCHEMES` is put in place of another."""
    models = TabularModel(target.float()), TabularModel(draft.float())
    if isinstance(scheme, str):
        return mcsd.Engine(*models, tree=tree, scheme=scheme, max_batch=2048, max_length=8)
    engine = mcsd.Engine(*models, tree=tree, max_batch=2048, max_length=8)
    engine._scheme = scheme
    return engine
