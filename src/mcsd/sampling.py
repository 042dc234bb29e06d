"""From logits to probabilities: the one path, for target and draft, in float32 (float64 stays float64)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mcsd import kernels
from mcsd.params import SamplingParams

_ROUNDING = 1e-6
"""Mass by which a sum may miss top_p and still count as having reached it: float32 sums are no better."""

_PART = 64
"""Tokens of a part of the vocabulary of which first only the likeliest is looked at."""

_LARGE = 2**14
"""Tokens of a vocabulary of which several likeliest are found sooner by parts."""

_HEAD = 1024
"""Truncation looks at this many of the likeliest tokens first; a full sort is needed only when they do not suffice."""


@dataclass(frozen=True)
class Settings:
    """The sampling parameters of a batch as tensors, one entry a row.

    Attributes:
        params: the requests' own parameters, ``B`` of them.
        temperature: float64 ``[B]``, 1 for greedy rows.
        greedy: bool ``[B]``, rows at temperature 0.
        top_k, top_p, min_p: ``[B]``, as in `SamplingParams`.
        truncates: bool ``[B]``, rows on which any of those three has an effect.
    """

    params: tuple[SamplingParams, ...]
    temperature: Tensor
    greedy: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    truncates: Tensor

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> "Settings":
        """Gather the parameters of a batch."""

        def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        temperature = column([p.temperature for p in params], torch.float64)
        greedy = temperature == 0
        top_k = column([p.top_k for p in params], torch.int64)
        top_p = column([p.top_p for p in params], torch.float64)
        min_p = column([p.min_p for p in params], torch.float64)
        truncates = ((top_k > 0) | (top_p < 1) | (min_p > 0)) & ~greedy
        return cls(tuple(params), temperature.masked_fill(greedy, 1.0), greedy, top_k, top_p, min_p, truncates)

    @cached_property
    def any_greedy(self) -> bool:
        """Whether there is a greedy row."""
        return bool(self.greedy.any())

    @cached_property
    def all_greedy(self) -> bool:
        """Whether there is no other."""
        return bool(self.greedy.all())

    @cached_property
    def any_truncates(self) -> bool:
        """Whether there is a row that truncates."""
        return bool(self.truncates.any())

    @cached_property
    def all_plain(self) -> bool:
        """Whether every row is at temperature 1, as greedy ones are."""
        return bool((self.temperature == 1).all())

    @cached_property
    def factors(self) -> Tensor:
        """float32 ``[B]``, what temperatures multiply logits by."""
        return (1 / self.temperature.clamp(min=torch.finfo(torch.float32).tiny)).float()

    def repeated(self, times: int) -> "Settings":
        """Each row so many times, one behind the other."""
        if times not in self._repeated:
            rows = torch.arange(len(self.params), device=self.greedy.device).repeat_interleave(times)
            self._repeated[times] = self.select(rows)
        return self._repeated[times]

    @cached_property
    def _repeated(self) -> dict[int, "Settings"]:
        return {}

    def select(self, rows: Tensor) -> "Settings":
        """The settings of some rows, int64 ``[A]``; a row may be named more than once."""
        chosen = rows.tolist()
        if chosen == list(range(len(self.params))):
            return self
        return Settings(
            tuple(self.params[row] for row in chosen),
            self.temperature[rows],
            self.greedy[rows],
            self.top_k[rows],
            self.top_p[rows],
            self.min_p[rows],
            self.truncates[rows],
        )


@dataclass(frozen=True)
class SparseDistributions:
    """Distributions with a small support.

    Attributes:
        support: int64 ``[..., S]``, distinct token ids.
        weights: float ``[..., S]``, their probabilities, summing to 1.
    """

    support: Tensor
    weights: Tensor


def probabilities(logits: Tensor, settings: Settings) -> Tensor:
    """The distribution each row is sampled from, in the order of transformers' warpers.

    Args:
        logits: ``[A, V]`` of any float type, penalties and bias already in.
        settings: of the same A rows.

    Returns:
        ``[A, V]``; one-hot at the argmax for greedy rows. A row whose logits hold NaN, or whose largest is
        infinite, is NaN throughout.
    """
    if settings.all_greedy:
        return _one_hot(_wide(logits))
    p = _softmax(logits, settings)
    if settings.any_truncates:
        chosen = settings.truncates.nonzero()[:, 0]
        p[chosen] = _truncated(p[chosen], settings.select(chosen))
    if settings.any_greedy:
        p[settings.greedy] = _one_hot(_wide(logits[settings.greedy]))
    return p


def sparse_probabilities(logits: Tensor, settings: Settings, width: int) -> SparseDistributions:
    """A draft's distribution, cut to its ``width`` likeliest tokens and renormalised.

    Any q is lossless as long as the draws come from it; a small support makes draws and residuals cost nothing.
    Greedy rows keep the draft's distribution at temperature 1, which ranks the candidates.

    Args:
        logits: ``[A, V]``.
        settings: of the same A rows.
        width: the most tokens to keep.
    """
    top, support = largest(logits, min(width, logits.shape[-1]))
    q = _softmax(top, settings)
    if settings.any_truncates:
        keep = _kept(q, settings) | ~settings.truncates[:, None]
        q = q * keep
        q = q / q.sum(-1, keepdim=True)
    return SparseDistributions(support, q)


def largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What ``logits.topk(count)`` gives for ``[A, V]``, as `_wide`; of equal ones perhaps others.

    Of a row that holds NaN the first is NaN.

    For a large vocabulary it is sooner: the largest are in those parts whose own largest are the largest.
    """
    rows, size = logits.shape
    if size >= 4 * count * _PART and kernels.suits(logits):
        return kernels.largest(logits, count)
    logits = _wide(logits)
    if size % _PART or size < max(_LARGE, 4 * count * _PART):
        values, ids = logits.topk(count, dim=-1)
        return values, ids
    parts = logits.reshape(rows, size // _PART, _PART)
    best = parts.amax(-1).topk(count, dim=-1).indices
    values, place = parts.gather(1, best[..., None].expand(-1, -1, _PART)).flatten(1).topk(count, dim=-1)
    return values, best.gather(1, place // _PART) * _PART + place % _PART


def likeliest_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of ``[A, V]`` and where it stands, the first of equal ones: both ``[A]``.

    What ``logits.max(-1)`` gives, sooner for a large vocabulary: only in one of its parts a place is looked for. A row
    that holds NaN gives NaN.
    """
    rows, size = logits.shape
    if kernels.suits(logits):
        values, place = kernels.largest(logits, 1)
        return values[:, 0], place[:, 0]
    if size % _PART:
        values, place = logits.max(-1)
        return values, place
    parts = logits.reshape(rows, size // _PART, _PART)
    part = parts.amax(-1).argmax(-1, keepdim=True)
    values, place = parts.take_along_dim(part[..., None], dim=1)[:, 0].max(-1)
    return values, part[:, 0] * _PART + place


def shape_logits(logits: Tensor, params: SamplingParams, prompt: Sequence[int], text: Sequence[int]) -> Tensor:
    """Penalties and bias of one request.

    The repetition penalty counts prompt and text (Keskar et al. 2019, as transformers does); presence and frequency
    penalties count the text only (as the OpenAI API does).

    Args:
        logits: ``[V]``.
        params: the request's parameters.
        prompt: its prompt.
        text: all that precedes the token to be chosen, candidates of the path included.
    """
    logits = logits.clone() if logits.dtype == torch.float64 else logits.to(torch.float32, copy=True)
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt, *text}), device=logits.device)
        old = logits[seen]
        logits[seen] = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    if text and (params.presence_penalty or params.frequency_penalty):
        counts = torch.tensor(list(text), device=logits.device).bincount(minlength=len(logits)).to(logits.dtype)
        logits -= params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    return logits


def _wide(logits: Tensor) -> Tensor:
    """In float32; float64 stays float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _one_hot(logits: Tensor) -> Tensor:
    best = logits.max(-1, keepdim=True)
    rest = torch.where(best.values.isfinite(), 0.0, torch.nan).to(logits.dtype)
    return rest.repeat(1, logits.shape[1]).scatter_(1, best.indices, 1 + rest)


def _softmax(logits: Tensor, settings: Settings) -> Tensor:
    if kernels.suits(logits):
        return kernels.softmax(logits, None if settings.all_plain else settings.factors)
    logits = _wide(logits)
    if settings.all_plain:
        return logits.softmax(-1)
    # The maximum goes first, so that dividing by a tiny temperature cannot overflow; nor may it become 0.
    shifted = logits - logits.amax(-1, keepdim=True)
    divisor = settings.temperature[:, None].to(logits.dtype).clamp(min=torch.finfo(logits.dtype).tiny)
    return (shifted / divisor).softmax(-1)


def _truncated(p: Tensor, settings: Settings) -> Tensor:
    top, index = p.topk(min(_HEAD, p.shape[-1]), dim=-1)
    keep = _kept(top, settings)
    # The head suffices if what is kept ends in it, and so do the tokens that tie with the k-th, whose mass counts.
    kth = top.gather(1, (settings.top_k.clamp(1, top.shape[-1]) - 1)[:, None])
    tied = (settings.top_k > 0)[:, None] & (top[:, -1:] >= kth)
    cut = torch.zeros_like(p).scatter_(1, index, top * keep)
    more = (keep[:, -1:] | tied)[:, 0].nonzero()[:, 0]
    if top.shape[-1] < p.shape[-1] and len(more):
        # Only those rows: what is kept of equal tokens must not depend on the other rows.
        top, index = p[more].sort(-1, descending=True)
        cut[more] = torch.zeros_like(top).scatter_(1, index, top * _kept(top, settings.select(more)))
    return cut / cut.sum(-1, keepdim=True)


def _kept(top: Tensor, settings: Settings) -> Tensor:
    """Which of the likeliest tokens survive top-k, top-p, min-p: bool like ``top [A, S]``, probabilities descending.

    Tokens that tie with the k-th are kept, as transformers keeps them.
    """
    limit = torch.where(settings.top_k > 0, settings.top_k, top.shape[-1]).clamp(max=top.shape[-1])
    keep = top >= top.gather(1, limit[:, None] - 1)
    kept = top * keep
    mass = torch.where(settings.top_k > 0, kept.sum(-1), 1.0)[:, None]
    above = kept.cumsum(-1) - kept
    # At top_p = 1 nothing is cut, though rounding may bring the sum to 1 before the end.
    keep &= (above < settings.top_p[:, None] * mass - _ROUNDING) | (settings.top_p[:, None] == 1)
    keep &= top >= settings.min_p[:, None].to(top.dtype) * top[:, :1]
    # top_p may be so small that rounding leaves nothing: the likeliest token always stays.
    keep[:, 0] = True
    return keep
