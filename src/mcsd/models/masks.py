"""Attention masks and positions of in-flight tokens, for tree attention with full or sliding-window layers."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mcsd.models.layout import TokenLayout


def attention_mask(layout: TokenLayout, lengths: Tensor, columns: int) -> Tensor:
    """bool ``[B, n, columns]``: all committed tokens, and the in-flight tokens that the layout allows.

    Args:
        layout: of the in-flight tokens.
        lengths: int64 ``[B]``, committed tokens of each sequence.
        columns: cache slots, at least those of the longest sequence.
    """
    # Committed slots read the first column of the padded mask, slots after the in-flight tokens its last one.
    column = torch.arange(1, 1 + columns, device=lengths.device) - lengths[:, None]
    return layout.padded_mask[:, column.clamp_(0, layout.total + 1)].transpose(0, 1)


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, 1, n, columns]``: 0 where attention is allowed, the lowest finite value elsewhere."""
    mask = torch.full(allowed.shape, torch.finfo(dtype).min, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(allowed, 0.0)[:, None]


@dataclass(frozen=True)
class Masks:
    """Positions and additive masks of one forward.

    Attributes:
        positions: int64 ``[B, n]``, of the new tokens.
        full, sliding: additive ``[B, 1, n, columns]``; sliding is None for models without a window.
    """

    positions: Tensor
    full: Tensor
    sliding: Tensor | None


def make_masks(
    layout: TokenLayout,
    lengths: Tensor,
    columns: int,
    dtype: torch.dtype,
    max_length: int | None = None,
    window: int | None = None,
    skips_first: bool = False,
) -> Masks:
    """Positions and masks of the new tokens.

    Args:
        layout: of the in-flight tokens.
        lengths: int64 ``[B]``, committed tokens of each sequence.
        columns: cache slots that the forward reads.
        dtype: of the masks.
        max_length: the context length; a tree may reach beyond it, where its tokens are never emitted.
        window: positions that tokens of sliding-window layers see, their own included.
        skips_first: whether tokens after the first one of a text do not attend to it.
    """
    layout = layout.to(lengths.device)
    positions = lengths[:, None] + layout.offsets
    if max_length is not None:
        positions = positions.clamp(max=max_length - 1)
    new = positions[:, layout.earlier :]
    allowed = attention_mask(layout, lengths, columns)
    if skips_first:
        allowed[..., 0] &= new == 0
    full = additive_mask(allowed, dtype)
    if window is None:
        return Masks(new, full, None)
    # The position of a committed slot is the slot itself, that of an in-flight slot follows from its offset.
    slots = torch.arange(columns + layout.total, device=lengths.device).expand(len(lengths), -1).clone()
    slots.scatter_(1, lengths[:, None] + torch.arange(layout.total, device=lengths.device), positions)
    near = slots[:, None, :columns] > new[..., None] - window
    return Masks(new, full, additive_mask(allowed & near, dtype))


def layer_windows(config: Any) -> list[int | None]:
    """The sliding window of each layer, in positions, a token's own included; None for full attention."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
