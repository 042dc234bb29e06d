"""The exact law of a context's next two tokens, and what a sample of pairs says about it."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from mcsd.models import LanguageModel
from mcsd.params import SamplingParams
from mcsd.verify.plain import in_other_shapes, law, plain_logits
from mcsd.verify.statistics import total_variation

_FOLLOWED = 8
"""First tokens, the likeliest ones, whose second tokens are told apart: one forward each."""

_LEAST = 20
"""Samples expected in a cell, at least. Where nearly all cells expect just as many, the statistic exceeds chi-square's
quantile of 6·10⁻⁵ twice as often as it should, in two million trials; where they expect 10, four times as often."""

_DRAWS = 200
"""Samples, as large as the engine's, that are drawn from the law itself to see what total variation they show."""


@dataclass(frozen=True)
class PairLaw:
    """The law of two tokens.

    Attributes:
        first: int64 ``[K]``, the first tokens that are followed.
        table: float64 ``[K + 1, V]``: row k holds the pairs that begin with ``first[k]``, by second token; the last
            row holds the other first tokens, whatever comes second. All sums to 1.
        others: the same, from forwards in other shapes.
    """

    first: Tensor
    table: Tensor
    others: tuple[Tensor, ...]

    def count(self, pairs: Counter[tuple[int, ...]]) -> Tensor:
        """How often each entry of the table was seen, float64 ``[K + 1, V]``."""
        row = {token: k for k, token in enumerate(self.first.tolist())}
        size = self.table.shape[1]
        places = [row[a] * size + b if a in row else len(row) * size + a for a, b in pairs]
        counts = torch.tensor(list(pairs.values()), dtype=torch.float64)
        flat = torch.zeros(self.table.numel(), dtype=torch.float64)
        return flat.index_add_(0, torch.tensor(places), counts).view_as(self.table)


def pair_law(target: LanguageModel, context: list[int], params: SamplingParams) -> PairLaw:
    """One forward of the target for the first token, one for each of the likeliest first tokens for the second."""
    tokens = torch.tensor([context], device=target.device)
    one = law(plain_logits(target, tokens, 1)[:, 0], params, context, [()])[0]
    first = one.topk(min(_FOLLOWED, int((one > 0).sum()))).indices
    longer = torch.cat([tokens.expand(len(first), -1), first[:, None]], dim=1)
    texts = [(token,) for token in first.tolist()]
    # Row by row: this is the law, and no shape is plainer.
    rows = [plain_logits(target, row[None], 1)[:, 0] for row in longer]
    table = _joint(first, one, law(torch.cat(rows), params, context, texts))
    others = [
        _joint(first, law(a[:, 0], params, context, [()])[0], law(b[:, 0], params, context, texts))
        for a, b in zip(in_other_shapes(target, tokens, 1), in_other_shapes(target, longer, 1), strict=True)
    ]
    return PairLaw(first.cpu(), table, tuple(others))


def _joint(first: Tensor, one: Tensor, two: Tensor) -> Tensor:
    rest = one.index_fill(0, first, 0.0)
    return torch.cat([one[first, None] * two, rest[None]]).cpu()


@dataclass(frozen=True)
class Comparison:
    """A sample held against a law; the attributes are those of `mcsd.verify.report.Context`."""

    samples: int
    cells: int
    chi_square: float
    forbidden: int
    total_variation: float
    plain: tuple[float, float, float]
    rounding: float
    distance: float


def compare(pairs: Counter[tuple[int, ...]], law: PairLaw, seed: int) -> Comparison:
    """Count over cells, and where the law forbids.

    Args:
        pairs: what the engine said, and how often.
        law: of the same context.
        seed: of the samples drawn for comparison.
    """
    samples, seen = pairs.total(), law.count(pairs)
    cell = lumps(law.table, samples)
    p, counts = _add(cell, law.table), _add(cell, seen)
    others = [_add(cell, other) for other in law.others]
    return Comparison(
        samples=samples,
        cells=len(p),
        chi_square=float(((counts - samples * p) ** 2 / (samples * p)).sum()),
        forbidden=int(seen[law.table == 0].sum()),
        total_variation=float(total_variation(counts, p)),
        plain=_plain_sampling(p, samples, seed),
        rounding=max(float((other - law.table).abs().sum() / 2) for other in law.others),
        distance=max(float(((other - p) ** 2 / p).sum()) for other in others),
    )


def lumps(table: Tensor, samples: int) -> Tensor:
    """The cell of each entry of a `PairLaw.table`, int64 like it, numbered from 0; each expects `_LEAST` samples.

    An entry that expects as many is a cell. The others of a row are one; where they are too few, those of all such
    rows are one with the last row's, and if these are too few, with the smallest cell.
    """
    rows = len(table)
    large = table * samples >= _LEAST
    cell = torch.arange(rows)[:, None].repeat(1, table.shape[1])
    cell[large] = rows + torch.arange(int(large.sum()))
    mass = torch.zeros(rows + int(large.sum()), dtype=torch.float64).index_add_(0, cell.flatten(), table.flatten())
    home = torch.arange(len(mass))
    small = mass * samples < _LEAST
    home[small] = rows - 1
    small[rows - 1] = True
    if mass[home == rows - 1].sum() * samples < _LEAST and not small.all():
        home[home == rows - 1] = mass.masked_fill(small, 2.0).argmin()
    numbered: Tensor = torch.unique(home, return_inverse=True)[1]
    return numbered[cell]


def _add(cell: Tensor, table: Tensor) -> Tensor:
    """Sums of a table over cells, float64 ``[C]``."""
    return torch.zeros(int(cell.max()) + 1, dtype=torch.float64).index_add_(0, cell.flatten(), table.flatten())


def _plain_sampling(p: Tensor, samples: int, seed: int) -> tuple[float, float, float]:
    generator = torch.Generator().manual_seed(seed)
    shown = []
    for _ in range(_DRAWS):
        drawn = torch.multinomial(p, samples, replacement=True, generator=generator)
        shown.append(total_variation(drawn.bincount(minlength=len(p)).double(), p))
    values = torch.stack(shown)
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, float(values.mean()), high
