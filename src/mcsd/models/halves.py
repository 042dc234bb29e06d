"""A decoder layer of the Llama kind as two functions, before and behind its attention."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from mcsd.models.fusion import Attention

Before = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""States ``[T, H]``, cosines and sines ``[T, 1, size]`` to queries, keys and values ``[T, heads, size]``."""

Behind = Callable[[Tensor, Tensor], Tensor]
"""States ``[T, H]`` and what their attention has seen ``[T, heads * size]`` to the layer's output ``[T, H]``."""


def halve(layer: Any, before: Before, behind: Behind) -> None:
    """Let a fused decoder layer run as these two functions, in place, until its ``forward`` is deleted."""
    layer.forward = partial(run_halves, before, behind, layer.self_attn)


def run_halves(
    before: Before,
    behind: Behind,
    attention: Attention,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor],
    past_key_values: Any = None,
    **_: Any,
) -> Tensor:
    """A decoder layer as it is in transformers, with rows and tokens as one dimension for the two functions."""
    rows, length, size = hidden_states.shape
    states = _flat(hidden_states)
    # All rows may have the same positions.
    heads = before(states, *(_flat(part.expand(rows, -1, -1, -1)) for part in position_embeddings))
    queries, keys, values = (part.view(rows, length, *part.shape[1:]) for part in heads)
    seen = attention.attend(queries, keys, values, attention_mask, past_key_values)
    return behind(states, _flat(seen)).view(rows, length, size)


def _flat(tensor: Tensor) -> Tensor:
    """``[B, n, ...]`` as ``[B * n, ...]``; no view, whose base would be a shape of its own to compile for."""
    return tensor.flatten(0, 1).data
