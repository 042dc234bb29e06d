"""From logits to probabilities: the one path, for target and draft, in float32 (float64 stays float64)."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mcsd import ops
from mcsd.grammars import GrammarMatcher
from mcsd.params import SamplingParams

_TOP_P_TOLERANCE = 1e-6
"""A float32 sum this far below top_p counts as having reached it."""

_FIRST_SORT = 1024
"""Truncation sorts this many of the most probable tokens, and the whole vocabulary only if they do not suffice."""


@dataclass(frozen=True)
class BatchSamplingParams:
    """The sampling parameters of a batch as tensors, one entry a sequence.

    Attributes:
        params: the requests' own parameters, ``B`` of them.
        matchers: the states of their grammars; None for a request without one.
        temperature: float64 ``[B]``, 1 for greedy sequences.
        greedy: bool ``[B]``, sequences at temperature 0.
        top_k, top_p, min_p, typical_p: ``[B]``, as in `SamplingParams`.
        truncates: bool ``[B]``, sequences on which top-k, top-p or min-p has an effect.
        plain: bool ``[B]``, sequences without `SamplingParams.speculative`.
    """

    params: tuple[SamplingParams, ...]
    matchers: tuple[GrammarMatcher | None, ...]
    temperature: Tensor
    greedy: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    typical_p: Tensor
    truncates: Tensor
    plain: Tensor

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        device: torch.device,
        matchers: Sequence[GrammarMatcher | None] | None = None,
    ) -> "BatchSamplingParams":
        """Gather the parameters of a batch, and its ``matchers`` if a request has a grammar."""

        def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        temperature = column([p.temperature for p in params], torch.float64)
        greedy = temperature == 0
        top_k = column([p.top_k for p in params], torch.int64)
        top_p = column([p.top_p for p in params], torch.float64)
        min_p = column([p.min_p for p in params], torch.float64)
        typical_p = column([p.typical_p for p in params], torch.float64)
        truncates = ((top_k > 0) | (top_p < 1) | (min_p > 0)) & ~greedy
        scaling = temperature.masked_fill(greedy, 1.0)
        states = (None,) * len(params) if matchers is None else tuple(matchers)
        plain = torch.tensor([not p.speculative for p in params], dtype=torch.bool, device=device)
        return cls(tuple(params), states, scaling, greedy, top_k, top_p, min_p, typical_p, truncates, plain)

    @cached_property
    def any_greedy(self) -> bool:
        """Whether a sequence is greedy."""
        return any(p.temperature == 0 for p in self.params)

    @cached_property
    def all_greedy(self) -> bool:
        """Whether every sequence is greedy."""
        return all(p.temperature == 0 for p in self.params)

    @cached_property
    def any_plain(self) -> bool:
        """Whether a sequence is decoded plainly."""
        return not all(p.speculative for p in self.params)

    @cached_property
    def all_plain(self) -> bool:
        """Whether every sequence is decoded plainly."""
        return not any(p.speculative for p in self.params)

    @cached_property
    def any_seeded(self) -> bool:
        """Whether a sequence with candidates is sampled with a seed; see `SamplingParams.is_seeded`."""
        return any(p.is_seeded and p.speculative for p in self.params)

    @cached_property
    def any_truncates(self) -> bool:
        """Whether a sequence truncates."""
        return any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0) for p in self.params)

    @cached_property
    def any_typical(self) -> bool:
        """Whether typical-p has an effect on a sequence."""
        return any(p.temperature > 0 and p.typical_p < 1 for p in self.params)

    @cached_property
    def any_penalties(self) -> bool:
        """Whether a sequence has penalties, bias, processors or a grammar."""
        return self.any_grammars or any(p.changes_logits for p in self.params)

    @cached_property
    def any_processors(self) -> bool:
        """Whether a sequence has logits processors or a grammar: only the host can run them."""
        return self.any_grammars or any(p.logits_processors for p in self.params)

    @cached_property
    def any_grammars(self) -> bool:
        """Whether a sequence has a grammar."""
        return any(self.matchers)

    @cached_property
    def scaling_temperature(self) -> Tensor | None:
        """`temperature`, or None where it is 1 for every sequence."""
        return None if all(p.temperature in (0, 1) for p in self.params) else self.temperature

    def repeat_interleave(self, times: int) -> "BatchSamplingParams":
        """Each sequence ``times`` times, one copy after the other."""
        if times not in self._repeated:
            params = tuple(each for each in self.params for _ in range(times))
            matchers = tuple(each for each in self.matchers for _ in range(times))
            self._repeated[times] = BatchSamplingParams(
                params, matchers, *(column.repeat_interleave(times) for column in self.tensors)
            )
        return self._repeated[times]

    @cached_property
    def _repeated(self) -> dict[int, "BatchSamplingParams"]:
        return {}

    def select(self, sequences: Tensor) -> "BatchSamplingParams":
        """The parameters of some sequences, int64 ``[A]``; one may be selected more than once."""
        chosen = sequences.tolist()
        if chosen == list(range(len(self.params))):
            return self
        params = tuple(self.params[index] for index in chosen)
        matchers = tuple(self.matchers[index] for index in chosen)
        return BatchSamplingParams(params, matchers, *(column[sequences] for column in self.tensors))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors."""
        truncation = self.top_k, self.top_p, self.min_p, self.typical_p, self.truncates
        return self.temperature, self.greedy, *truncation, self.plain

    def with_tensors(self, tensors: Sequence[Tensor]) -> "BatchSamplingParams":
        """A copy with other `tensors`."""
        return BatchSamplingParams(self.params, self.matchers, *tensors)

    @cached_property
    def kind(self) -> Hashable:
        """What the host decides by: batches of equal kinds and sizes take the same operations."""
        unscaled = self.scaling_temperature is None
        return self.any_greedy, self.all_greedy, self.any_truncates, self.any_typical, self.any_penalties, unscaled


@dataclass(frozen=True)
class SparseDistributions:
    """Distributions with a small support.

    Attributes:
        support: int64 ``[..., S]``, distinct token ids.
        weights: float ``[..., S]``, their probabilities, summing to 1.
    """

    support: Tensor
    weights: Tensor


def probabilities(logits: Tensor, sampling: BatchSamplingParams) -> Tensor:
    """The distribution each sequence is sampled from, in the order of transformers' warpers.

    Args:
        logits: ``[A, V]`` of any float type, penalties and bias included.
        sampling: of the same A sequences.

    Returns:
        ``[A, V]``; one-hot at the argmax for greedy sequences. A distribution whose logits hold NaN, or whose largest
        logit is infinite, is NaN throughout.
    """
    if sampling.all_greedy:
        return _one_hot(ops.to_float32(logits))
    p = ops.softmax(logits, sampling.scaling_temperature)
    if sampling.any_truncates and p.device.type != "cpu":
        cut = _cut_by_sorting(p, sampling)
        p = torch.where(sampling.truncates[:, None], cut / cut.sum(-1, keepdim=True), p)
    elif sampling.any_truncates:
        chosen = sampling.truncates.nonzero()[:, 0]
        p[chosen] = _truncate(p[chosen], sampling.select(chosen))
    if sampling.any_typical:
        p = _keep_typical(p, sampling)
    if sampling.any_greedy:
        p = torch.where(sampling.greedy[:, None], _one_hot(ops.to_float32(logits)), p)
    return p


def sparse_probabilities(logits: Tensor, sampling: BatchSamplingParams, width: int) -> SparseDistributions:
    """A draft's distribution, cut to its ``width`` most probable tokens and renormalised.

    Any q is lossless as long as the candidates are drawn from it. A small support makes draws and residuals cheap.
    Greedy sequences keep the draft's distribution at temperature 1, which ranks the candidates.

    Args:
        logits: ``[A, V]``.
        sampling: of the same A sequences.
        width: the most tokens to keep.
    """
    top, support = ops.top_k(logits, min(width, logits.shape[-1]))
    q = ops.softmax(top, sampling.scaling_temperature)
    if sampling.any_truncates:
        keep = _truncation_mask(q, sampling) | ~sampling.truncates[:, None]
        q = q * keep
        q = q / q.sum(-1, keepdim=True)
    if sampling.any_typical:
        q = _keep_typical(q, sampling)
    return SparseDistributions(support, q)


def apply_penalties(logits: Tensor, params: SamplingParams, prompt: Sequence[int], text: Sequence[int]) -> Tensor:
    """Penalties, bias and logits processors of one request.

    The repetition penalty counts prompt and text (Keskar et al. 2019, as transformers does); presence and frequency
    penalties count the text only (as the OpenAI API does).

    Args:
        logits: ``[V]``.
        params: the request's parameters.
        prompt: its prompt.
        text: all generated tokens before the one to be chosen, candidates on its path included.
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
    if params.logits_processors:
        ids = torch.tensor([[*prompt, *text]], device=logits.device)
        for processor in params.logits_processors:
            logits = processor(ids, logits[None])[0]
    return logits


@dataclass(frozen=True)
class Penalties:
    """`apply_penalties` for a whole batch, from counts on the device.

    Attributes:
        counts: float32 ``[B, V]``, occurrences of each token in the generated text.
        seen: bool ``[B, V]``, tokens of prompt and text.
        bias: float32 ``[B, V]``, or None without any.
        repetition, presence, frequency: float32 ``[B, 1]``.
    """

    counts: Tensor
    seen: Tensor
    bias: Tensor | None
    repetition: Tensor
    presence: Tensor
    frequency: Tensor

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        prompts: Sequence[Sequence[int]],
        generated: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device,
    ) -> "Penalties":
        """The penalties of each sequence after its prompt and the tokens generated since."""
        counts = torch.stack([torch.tensor(list(text)).long().bincount(minlength=vocab_size) for text in generated])
        read = torch.stack([torch.tensor(list(text)).long().bincount(minlength=vocab_size) for text in prompts])
        bias = torch.zeros(len(params), vocab_size)
        for row, each in enumerate(params):
            for token, value in each.logit_bias.items():
                bias[row, token] = value
        factors = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params]
        return cls(
            counts.float().to(device),
            (counts + read > 0).to(device),
            bias.to(device) if any(p.logit_bias for p in params) else None,
            *torch.tensor(factors, device=device)[..., None].unbind(1),
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors."""
        bias = () if self.bias is None else (self.bias,)
        return self.counts, self.seen, self.repetition, self.presence, self.frequency, *bias

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Penalties":
        """A copy with other `tensors`."""
        counts, seen, repetition, presence, frequency, *bias = tensors
        return Penalties(counts, seen, bias[0] if bias else None, repetition, presence, frequency)

    def after(self, tokens: Tensor, valid: Tensor) -> "Penalties":
        """The penalties after more tokens ``[B, L]`` of the text, where they are ``valid [B, L]``."""
        counts = self.counts.scatter_add(1, tokens, valid.to(self.counts.dtype))
        return replace(self, counts=counts, seen=self.seen | (counts > 0))

    def apply(self, logits: Tensor) -> Tensor:
        """Penalized logits ``[B, V]``, in float32; float64 stays float64."""
        logits = ops.to_float32(logits)
        penalized = torch.where(logits > 0, logits / self.repetition, logits * self.repetition)
        logits = torch.where(self.seen, penalized, logits)
        logits = logits - (self.presence * (self.counts > 0) + self.frequency * self.counts)
        return logits if self.bias is None else logits + self.bias


def _one_hot(logits: Tensor) -> Tensor:
    """One-hot at the argmax of ``[A, V]``; NaN throughout where the largest logit is not finite."""
    best = logits.max(-1, keepdim=True)
    rest = torch.where(best.values.isfinite(), 0.0, torch.nan).to(logits.dtype)
    return rest.repeat(1, logits.shape[1]).scatter_(1, best.indices, 1 + rest)


def _cut_by_sorting(p: Tensor, sampling: BatchSamplingParams) -> Tensor:
    """``p [A, V]`` cut by top-k, top-p and min-p, not renormalised. The host need not know the numbers."""
    top, ids = p.sort(-1, descending=True)
    return torch.zeros_like(p).scatter_(1, ids, top * _truncation_mask(top, sampling))


def _truncate(p: Tensor, sampling: BatchSamplingParams) -> Tensor:
    """``p [A, V]`` cut by top-k, top-p and min-p and renormalised."""
    top, ids = p.topk(min(_FIRST_SORT, p.shape[-1]), dim=-1)
    keep = _truncation_mask(top, sampling)
    # The first tokens suffice if the cut lies among them, ties with the k-th included, whose mass counts.
    kth = top.gather(1, (sampling.top_k.clamp(1, top.shape[-1]) - 1)[:, None])
    tied = (sampling.top_k > 0)[:, None] & (top[:, -1:] >= kth)
    cut = torch.zeros_like(p).scatter_(1, ids, top * keep)
    more = (keep[:, -1:] | tied)[:, 0].nonzero()[:, 0]
    if top.shape[-1] < p.shape[-1] and len(more):
        # Only those sequences: which of equal tokens are kept must not depend on the other sequences.
        cut[more] = _cut_by_sorting(p[more], sampling.select(more))
    return cut / cut.sum(-1, keepdim=True)


def _keep_typical(p: Tensor, sampling: BatchSamplingParams) -> Tensor:
    """``p [A, S]`` cut by typical-p and renormalised (Meister et al. 2022).

    Tokens are kept in order of how far their surprisal is from the entropy, as transformers does.
    """
    surprisal = -p.log()
    entropy = (p * surprisal).nansum(-1, keepdim=True)
    distance, order = (surprisal - entropy).abs().sort(-1)
    below = p.gather(1, order).cumsum(-1) < sampling.typical_p[:, None]
    last = below.sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
    keep = torch.zeros_like(below).scatter_(1, order, distance <= distance.gather(1, last))
    cut = p * keep
    affected = (sampling.typical_p < 1) & ~sampling.greedy
    return torch.where(affected[:, None], cut / cut.sum(-1, keepdim=True), p)


def _truncation_mask(top: Tensor, sampling: BatchSamplingParams) -> Tensor:
    """Which tokens top-k, top-p and min-p keep: bool like ``top [A, S]``, probabilities in descending order.

    Tokens that tie with the k-th are kept, as in transformers.
    """
    limit = torch.where(sampling.top_k > 0, sampling.top_k, top.shape[-1]).clamp(max=top.shape[-1])
    keep = top >= top.gather(1, limit[:, None] - 1)
    kept = top * keep
    mass = torch.where(sampling.top_k > 0, kept.sum(-1), 1.0)[:, None]
    above = kept.cumsum(-1) - kept
    # At top_p = 1 nothing is cut, though rounding may bring the sum to 1 before the end.
    keep &= (above < sampling.top_p[:, None] * mass - _TOP_P_TOLERANCE) | (sampling.top_p[:, None] == 1)
    keep &= top >= sampling.min_p[:, None].to(top.dtype) * top[:, :1]
    # With a tiny top_p rounding may leave no token: the most probable one always stays.
    keep[:, 0] = True
    return keep
