"""Distributions over a large vocabulary, in one call each."""

import torch
from torch import Tensor

from mcsd.kernels.library import DTYPES, available, call, readable

_LARGE = 2**14
"""Tokens of a vocabulary that is worth a call of a kernel."""

_PART = 64
"""Tokens of which `largest` knows the largest."""


def suits(logits: Tensor) -> bool:
    """Whether there are kernels for these logits ``[A, V]``."""
    return logits.device.type == "cpu" and logits.dtype in DTYPES and logits.shape[1] >= _LARGE and available()


def softmax(logits: Tensor, factors: Tensor | None) -> Tensor:
    """Softmax of logits that are multiplied by a factor, in float32.

    Args:
        logits: ``[A, V]``, in `DTYPES`.
        factors: float32 ``[A]``, positive, one for each row; None for ones.

    Returns:
        float32 ``[A, V]``. A row whose largest logit is no finite number is NaN throughout.

    Raises:
        ValueError: there are not as many factors as rows.
    """
    rows, size = logits.shape
    out = torch.empty(rows, size)
    if factors is not None:
        factors = readable(factors, rows, 1, torch.float32)
    call("softmax", readable(logits, rows, size, logits.dtype), logits.dtype, rows, size, factors, out)
    return out


def largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of each row, in falling order, of equal ones the first.

    Args:
        logits: ``[A, V]``, in `DTYPES`.
        count: how many, from 1 to V / 64.

    Returns:
        float32 ``[A, count]``, and int64 ``[A, count]`` where they stand. A row that holds NaN is NaN throughout.

    Raises:
        ValueError: there are too few parts of 64 to look for so many.
    """
    rows, size = logits.shape
    if not 1 <= count <= size // _PART:
        raise ValueError(f"{count} of {size} are none, or more than one of each {_PART}")
    values, places = torch.empty(rows, count), torch.empty(rows, count, dtype=torch.int64)
    call("largest", readable(logits, rows, size, logits.dtype), logits.dtype, rows, size, count, values, places)
    return values, places
