"""Additive attention masks for in-flight tokens: who sees whom, as a model of transformers takes it."""

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
    column = torch.arange(longest, device=lengths.device) - lengths[:, None]
    known = block.mask.shape[1]
    # Columns outside the in-flight part read the last, false, entry.
    padded = torch.nn.functional.pad(block.mask.to(lengths.device), (0, 1), value=False)
    in_flight = padded[:, torch.where((column >= 0) & (column < known), column, known)].transpose(0, 1)
    return in_flight | (column < 0)[:, None]


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, 1, n, columns]``: zero where a token may look, the least finite value elsewhere."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
