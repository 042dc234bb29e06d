"""The exact distribution of the next two tokens after a context, and a chi-square test of samples against it."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from mcsd.models import LanguageModel
from mcsd.params import SamplingParams
from mcsd.verify.oracle import recomputed_logits, reference_distribution, reference_logits
from mcsd.verify.statistics import total_variation

_MAX_FIRST_TOKENS = 8
"""First tokens, the most probable ones, whose second tokens are distinguished; each takes one forward."""

_MIN_EXPECTED = 20
"""Minimum expected samples per cell. If nearly all cells expect just as many, the statistic exceeds chi-square's
quantile of 6·10⁻⁵ twice as often as it should, in two million trials; with 10 per cell, four times as often."""

_SIMULATIONS = 200
"""Simulated samples of the exact distribution, for the total variation that sampling noise alone shows."""


@dataclass(frozen=True)
class PairDistribution:
    """The joint distribution of two tokens.

    Attributes:
        first: int64 ``[K]``, the first tokens whose second tokens are distinguished.
        table: float64 ``[K + 1, V]``: row k holds the pairs that begin with ``first[k]``, by second token; the last
            row holds the other first tokens with any second token. The sum over the table is 1.
        recomputed: the same table, from forwards in other shapes.
    """

    first: Tensor
    table: Tensor
    recomputed: tuple[Tensor, ...]

    def count(self, pairs: Counter[tuple[int, ...]]) -> Tensor:
        """Frequency of each entry of the table, float64 ``[K + 1, V]``."""
        row = {token: k for k, token in enumerate(self.first.tolist())}
        size = self.table.shape[1]
        entries = [row[a] * size + b if a in row else len(row) * size + a for a, b in pairs]
        counts = torch.tensor(list(pairs.values()), dtype=torch.float64)
        flat = torch.zeros(self.table.numel(), dtype=torch.float64)
        return flat.index_add_(0, torch.tensor(entries), counts).view_as(self.table)


def pair_distribution(target: LanguageModel, context: list[int], params: SamplingParams) -> PairDistribution:
    """One forward of the target for the first token, and one for each of the most probable first tokens."""
    tokens = torch.tensor([context], device=target.device)
    one = reference_distribution(reference_logits(target, tokens, 1)[:, 0], params, context, [()])[0]
    first = one.topk(min(_MAX_FIRST_TOKENS, int((one > 0).sum()))).indices
    longer = torch.cat([tokens.expand(len(first), -1), first[:, None]], dim=1)
    texts = [(token,) for token in first.tolist()]
    # Sequence by sequence: a batch would be one of the other shapes.
    logits = torch.cat([reference_logits(target, sequence[None], 1)[:, 0] for sequence in longer])
    table = _joint(first, one, reference_distribution(logits, params, context, texts))
    recomputed = [
        _joint(
            first,
            reference_distribution(a[:, 0], params, context, [()])[0],
            reference_distribution(b[:, 0], params, context, texts),
        )
        for a, b in zip(recomputed_logits(target, tokens, 1), recomputed_logits(target, longer, 1), strict=True)
    ]
    return PairDistribution(first.cpu(), table, tuple(recomputed))


def _joint(first: Tensor, one: Tensor, two: Tensor) -> Tensor:
    rest = one.index_fill(0, first, 0.0)
    return torch.cat([one[first, None] * two, rest[None]]).cpu()


@dataclass(frozen=True)
class SampleTest:
    """Samples compared with a distribution; for the attributes see `mcsd.verify.report.ContextReport`."""

    samples: int
    cells: int
    chi_square: float
    forbidden: int
    total_variation: float
    plain: tuple[float, float, float]
    rounding: float
    distance: float


def compare(pairs: Counter[tuple[int, ...]], distribution: PairDistribution, seed: int) -> SampleTest:
    """Compare sampled pairs with their exact distribution.

    Args:
        pairs: the engine's samples, with their frequencies.
        distribution: of the same context.
        seed: of the simulated samples.
    """
    samples, counts = pairs.total(), distribution.count(pairs)
    cells = pooled_cells(distribution.table, samples)
    p, observed = _sum_cells(cells, distribution.table), _sum_cells(cells, counts)
    recomputed = [_sum_cells(cells, table) for table in distribution.recomputed]
    return SampleTest(
        samples=samples,
        cells=len(p),
        chi_square=float(((observed - samples * p) ** 2 / (samples * p)).sum()),
        forbidden=int(counts[distribution.table == 0].sum()),
        total_variation=float(total_variation(observed, p)),
        plain=_simulated_total_variation(p, samples, seed),
        rounding=max(float((table - distribution.table).abs().sum() / 2) for table in distribution.recomputed),
        distance=max(float(((other - p) ** 2 / p).sum()) for other in recomputed),
    )


def pooled_cells(table: Tensor, samples: int) -> Tensor:
    """The chi-square cell of each entry of a `PairDistribution.table`, int64 of its shape, numbered from 0.

    An entry with at least `_MIN_EXPECTED` expected samples is a cell. The other entries of a row are pooled; where
    they expect too few, those of all such rows are pooled with the last row's, and if these still expect too few, with
    the smallest cell.
    """
    rows = len(table)
    large = table * samples >= _MIN_EXPECTED
    cell = torch.arange(rows)[:, None].repeat(1, table.shape[1])
    cell[large] = rows + torch.arange(int(large.sum()))
    mass = torch.zeros(rows + int(large.sum()), dtype=torch.float64).index_add_(0, cell.flatten(), table.flatten())
    pool = torch.arange(len(mass))
    small = mass * samples < _MIN_EXPECTED
    pool[small] = rows - 1
    small[rows - 1] = True
    if mass[pool == rows - 1].sum() * samples < _MIN_EXPECTED and not small.all():
        pool[pool == rows - 1] = mass.masked_fill(small, 2.0).argmin()
    numbered: Tensor = torch.unique(pool, return_inverse=True)[1]
    return numbered[cell]


def _sum_cells(cells: Tensor, table: Tensor) -> Tensor:
    """Sums of a table's entries by cell, float64 ``[C]``."""
    return torch.zeros(int(cells.max()) + 1, dtype=torch.float64).index_add_(0, cells.flatten(), table.flatten())


def _simulated_total_variation(p: Tensor, samples: int, seed: int) -> tuple[float, float, float]:
    """2.5 % quantile, mean and 97.5 % quantile of the total variation of samples that do follow ``p``."""
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(_SIMULATIONS):
        drawn = torch.multinomial(p, samples, replacement=True, generator=generator)
        distances.append(total_variation(drawn.bincount(minlength=len(p)).double(), p))
    values = torch.stack(distances)
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, float(values.mean()), high
