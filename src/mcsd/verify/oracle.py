"""The target's reference logits, and how much they change when they are computed in other shapes.

For a model of transformers the forwards here are transformers' own, without a tree, mask or cache of mcsd; where the
engine runs in the native decoder, without its kernels and packed layers too. An error in those can therefore neither
enter the reference distribution nor pass as rounding.
"""

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mcsd.models import LanguageModel, TokenLayout
from mcsd.models.transformers import cache_argument
from mcsd.params import SamplingParams
from mcsd.sampling import BatchSamplingParams, apply_penalties, probabilities

_PADS = (1, 8)
"""Padding tokens before a text. Without padding, a batch often gives the same bits as a single sequence."""

_EXTRA_TOKENS = 3
"""Tokens processed after the cached ones together with those whose logits are needed, as in a tree."""


@torch.no_grad()
def reference_logits(target: LanguageModel, tokens: Tensor, last: int) -> Tensor:
    """The logits ``[B, last, V]`` after the last tokens of ``[B, n]``, from one plain forward over the whole texts."""
    network = _network(target)
    if network is not None:
        return _plain(network, tokens, last)
    cache = target.new_cache(*tokens.shape)
    for _ in tokens:
        cache.add()
    return target.forward(tokens, TokenLayout.chain(tokens.shape[1], target.device), cache).logits[:, -last:]


def _plain(network: Any, tokens: Tensor, last: int) -> Tensor:
    out = network(tokens, attention_mask=torch.ones_like(tokens), use_cache=False, logits_to_keep=last)
    logits: Tensor = out.logits
    return logits


def recomputed_logits(target: LanguageModel, tokens: Tensor, last: int) -> Iterator[Tensor]:
    """`reference_logits` in other shapes: with padding, then with padding and transformers' own cache.

    A native decoder rounds otherwise than its reference does in bfloat16, so that is run in float32 too. A model that
    is not of transformers is run once more, in a batch of two.
    """
    network = _network(target)
    if network is not None:
        if network is not getattr(target, "network", None):
            yield _in_float32(network, tokens, last)
        yield _padded(network, tokens, last, _PADS[0], uncached=None)
        yield _padded(network, tokens, last, _PADS[1], uncached=last + _EXTRA_TOKENS)
    else:
        yield reference_logits(target, tokens.repeat(2, 1), last)[: len(tokens)]


_networks: "WeakKeyDictionary[Any, Any]" = WeakKeyDictionary()
"""References that were loaded, by target."""


def _network(target: LanguageModel) -> Any | None:
    """The network of transformers that is the reference of a target; None if there is none."""
    if not hasattr(target, "reference"):
        return None
    if target not in _networks:
        _networks[target] = target.reference()
    return _networks[target]


@torch.no_grad()
def _in_float32(network: Any, tokens: Tensor, last: int) -> Tensor:
    """Logits of a plain forward with the same weights, computed in float32."""
    weights = {parameter: parameter.data for parameter in network.parameters()}
    try:
        for parameter, data in weights.items():
            parameter.data = data.float()
        return _plain(network, tokens, last)
    finally:
        for parameter, data in weights.items():
            parameter.data = data


@torch.no_grad()
def _padded(network: Any, tokens: Tensor, last: int, pad: int, uncached: int | None) -> Tensor:
    """Logits of left-padded texts; the last ``uncached`` tokens are processed in a second forward."""
    padding = tokens.new_zeros(len(tokens), pad)
    padded, mask = torch.cat([padding, tokens], dim=1), torch.cat([padding, torch.ones_like(tokens)], dim=1)
    positions, past, cache = (mask.cumsum(-1) - 1).clamp(min=0), None, cache_argument(network)
    cut = 0 if uncached is None else max(padded.shape[1] - uncached, 0)
    if cut:
        out = network(
            padded[:, :cut],
            attention_mask=mask[:, :cut],
            position_ids=positions[:, :cut],
            use_cache=True,
            logits_to_keep=1,
        )
        past = getattr(out, cache)
    out = network(
        padded[:, cut:],
        attention_mask=mask,
        position_ids=positions[:, cut:],
        use_cache=True,
        logits_to_keep=last,
        **{cache: past},
    )
    logits: Tensor = out.logits
    return logits


def adjusted_logits(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], texts: Sequence[Sequence[int]]
) -> Tensor:
    """Logits ``[A, V]`` with penalties and bias, each after its own text; float32 or float64."""
    if params.changes_logits:
        return torch.stack(
            [apply_penalties(row, params, prompt, text) for row, text in zip(logits, texts, strict=True)]
        )
    return logits if logits.dtype == torch.float64 else logits.float()


def reference_distribution(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], texts: Sequence[Sequence[int]]
) -> Tensor:
    """The distributions to sample from, float64 ``[A, V]``, given the target's logits and the sampling parameters."""
    batch_params = BatchSamplingParams.of([params] * len(logits), logits.device)
    return probabilities(adjusted_logits(logits, params, prompt, texts), batch_params).double()
