"""Softmax and top-k of logits over a large vocabulary, in one call each."""

import torch
from torch import Tensor

from mcsd.kernels.library import DTYPES, call, has_kernels, readable

LARGE_VOCABULARY = 2**14
"""Tokens from which on a call of a kernel is faster than PyTorch."""

_CHUNK = 64
"""Tokens whose maximum `top_k` keeps, as in ``distributions.cpp``."""


def supported(logits: Tensor) -> bool:
    """Whether the kernels take these logits ``[A, V]``."""
    large = logits.shape[1] >= LARGE_VOCABULARY
    return logits.device.type == "cpu" and logits.dtype in DTYPES and large and has_kernels()


def softmax(logits: Tensor, factors: Tensor | None) -> Tensor:
    """Softmax of ``factors * logits``, in float32.

    Args:
        logits: ``[A, V]``, in `DTYPES`.
        factors: float32 ``[A]``, positive, the inverse temperatures; None for ones.

    Returns:
        float32 ``[A, V]``. A row whose maximum is not finite is NaN.

    Raises:
        ValueError: ``factors`` is not of size A.
    """
    rows, size = logits.shape
    out = torch.empty(rows, size)
    if factors is not None:
        factors = readable(factors, rows, 1, torch.float32)
    call("softmax", readable(logits, rows, size, logits.dtype), logits.dtype, rows, size, factors, out)
    return out


def top_k(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each row, in falling order, of equal ones the first.

    Args:
        logits: ``[A, V]``, in `DTYPES`.
        count: how many, from 1 to V / 64.

    Returns:
        Logits, float32 ``[A, count]``, and their tokens, int64 ``[A, count]``. A row that holds NaN gives NaN.

    Raises:
        ValueError: ``count`` is out of range.
    """
    rows, size = logits.shape
    if not 1 <= count <= size // _CHUNK:
        raise ValueError(f"the top {count} of {size} logits were asked for: from 1 to {size // _CHUNK} are possible")
    values, tokens = torch.empty(rows, count), torch.empty(rows, count, dtype=torch.int64)
    call("top_k", readable(logits, rows, size, logits.dtype), logits.dtype, rows, size, count, values, tokens)
    return values, tokens
