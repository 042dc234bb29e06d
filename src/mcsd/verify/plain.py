"""The target's own logits, and how far they move when the same numbers are computed in other shapes.

Nothing of a real network's forwards here is the engine's: no tree, no mask, no cache of ours. So a fault of those can
neither hide in the law that the engine is held to nor pass for rounding.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mcsd.models import Block, LanguageModel, TransformersModel
from mcsd.params import SamplingParams
from mcsd.sampling import Settings, probabilities, shape_logits

_PADS = (1, 8)
"""Masked places before a text. Without any, the kernels of a batch often repeat those of a single row bit for bit."""

_BLOCK = 3
"""Tokens that are read behind a cached text together with those whose logits are wanted, as in a tree."""


@torch.no_grad()
def plain_logits(target: LanguageModel, tokens: Tensor, last: int) -> Tensor:
    """The logits ``[B, last, V]`` after the last tokens of ``[B, n]``: one plain forward over the whole texts."""
    if isinstance(target, TransformersModel):
        out = target.network(tokens, attention_mask=torch.ones_like(tokens), use_cache=False, logits_to_keep=last)
        logits: Tensor = out.logits
        return logits
    cache = target.new_cache(*tokens.shape)
    for _ in tokens:
        cache.add()
    return target.forward(tokens, Block.chain(tokens.shape[1]), cache).logits[:, -last:]


def in_other_shapes(target: LanguageModel, tokens: Tensor, last: int) -> Iterator[Tensor]:
    """`plain_logits` again: in one batch, for a real network padded, then padded and behind transformers' own cache."""
    if isinstance(target, TransformersModel):
        yield _padded(target.network, tokens, last, _PADS[0], block=None)
        yield _padded(target.network, tokens, last, _PADS[1], block=last + _BLOCK)
    else:
        yield plain_logits(target, tokens.repeat(2, 1), last)[: len(tokens)]


@torch.no_grad()
def _padded(network: Any, tokens: Tensor, last: int, pad: int, block: int | None) -> Tensor:
    """Logits of texts behind masked places, as transformers pads them; ``block`` tokens are read after the others."""
    nothing = tokens.new_zeros(len(tokens), pad)
    padded, seen = torch.cat([nothing, tokens], dim=1), torch.cat([nothing, torch.ones_like(tokens)], dim=1)
    positions, past = (seen.cumsum(-1) - 1).clamp(min=0), None
    cut = 0 if block is None else max(padded.shape[1] - block, 0)
    if cut:
        mask, places = seen[:, :cut], positions[:, :cut]
        begun = network(padded[:, :cut], attention_mask=mask, position_ids=places, use_cache=True, logits_to_keep=1)
        past = begun.past_key_values
    out = network(
        padded[:, cut:],
        attention_mask=seen,
        position_ids=positions[:, cut:],
        past_key_values=past,
        use_cache=True,
        logits_to_keep=last,
    )
    logits: Tensor = out.logits
    return logits


def shaped(logits: Tensor, params: SamplingParams, prompt: Sequence[int], texts: Sequence[Sequence[int]]) -> Tensor:
    """Penalties and bias on ``[A, V]``, each row after its own text; floats of 32 bits or more."""
    if params.shapes_logits:
        return torch.stack([shape_logits(row, params, prompt, text) for row, text in zip(logits, texts, strict=True)])
    return logits if logits.dtype == torch.float64 else logits.float()


def law(logits: Tensor, params: SamplingParams, prompt: Sequence[int], texts: Sequence[Sequence[int]]) -> Tensor:
    """The distributions, float64 ``[A, V]``, that these logits and parameters call for."""
    settings = Settings.of([params] * len(logits), logits.device)
    return probabilities(shaped(logits, params, prompt, texts), settings).double()
