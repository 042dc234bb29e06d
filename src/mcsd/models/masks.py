"""Additive attention masks for in-flight tokens: who sees whom, as a model of transformers takes it."""

from typing import Any

import torch
from torch import Tensor

from mcsd.models.base import Block


def visible(block: Block, lengths: Tensor, longest: int) -> Tensor:
    """bool ``[B, n, longest]``: every committed token, and in flight what the block allows.

    Args:
        block: how the new tokens stand to each other and to the earlier ones in flight.
        lengths: int64 ``[B]``, committed tokens of each row.
        longest: columns, at least those of the longest row.
    """
    # Committed columns read the first entry of the block's rows, those behind what is in flight the last one.
    column = torch.arange(1, 1 + longest, device=lengths.device) - lengths[:, None]
    return block.framed.to(lengths.device)[:, column.clamp_(0, block.mask.shape[1] + 1)].transpose(0, 1)


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, 1, n, columns]``: zero where a token may look, the least finite value elsewhere."""
    mask = torch.full(allowed.shape, torch.finfo(dtype).min, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(allowed, 0.0)[:, None]


def windows(config: Any) -> list[int | None]:
    """How many positions the tokens of each layer see, their own included; None for all."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
