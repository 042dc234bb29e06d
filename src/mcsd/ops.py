"""Softmax, argmax and top-k of logits: the one place that chooses between torch and `mcsd.kernels`.

Everything is computed in float32; float64 stays float64.
"""

import torch
from torch import Tensor

from mcsd import kernels

_CHUNK = 64
"""Tokens of a chunk of the vocabulary. A chunk is searched only if its maximum is large enough."""


def to_float32(logits: Tensor) -> Tensor:
    """Logits in float32; float64 stays float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def softmax(logits: Tensor, temperature: Tensor | None = None) -> Tensor:
    """Softmax over the vocabulary.

    Args:
        logits: ``[A, V]``.
        temperature: float64 ``[A]``, positive; None for 1 throughout.

    Returns:
        ``[A, V]``. A row whose logits hold NaN, or whose maximum is infinite, is NaN throughout.
    """
    if kernels.supported(logits):
        if temperature is None:
            return kernels.softmax(logits, None)
        return kernels.softmax(logits, temperature.clamp(min=torch.finfo(torch.float32).tiny).reciprocal().float())
    logits = to_float32(logits)
    if temperature is None:
        return logits.softmax(-1)
    # The maximum is subtracted first, so that dividing by a tiny temperature cannot overflow. The divisor must not
    # become 0.
    shifted = logits - logits.amax(-1, keepdim=True)
    divisor = temperature[:, None].to(logits.dtype).clamp(min=torch.finfo(logits.dtype).tiny)
    return (shifted / divisor).softmax(-1)


def top_k(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and token ids of the ``count`` largest logits of each row of ``[A, V]``, as ``logits.topk(count)``.

    Among equal logits others may be chosen. The first value of a row that holds NaN is NaN.

    Faster for large vocabularies: the top k lie in the k chunks with the largest maxima, so only those are searched.
    """
    rows, size = logits.shape
    if size >= 4 * count * _CHUNK and kernels.supported(logits):
        return kernels.top_k(logits, count)
    logits = to_float32(logits)
    if size % _CHUNK or size < max(kernels.LARGE_VOCABULARY, 4 * count * _CHUNK):
        values, ids = logits.topk(count, dim=-1)
        return values, ids
    chunks = logits.reshape(rows, size // _CHUNK, _CHUNK)
    best = chunks.amax(-1).topk(count, dim=-1).indices
    values, index = chunks.gather(1, best[..., None].expand(-1, -1, _CHUNK)).flatten(1).topk(count, dim=-1)
    return values, best.gather(1, index // _CHUNK) * _CHUNK + index % _CHUNK


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row of ``[A, V]`` and its token id, the first of equal ones: both ``[A]``.

    As ``logits.max(-1)``, but faster for large vocabularies: only the chunk with the largest maximum is searched.
    The value of a row that holds NaN is NaN.
    """
    rows, size = logits.shape
    if kernels.supported(logits):
        values, ids = kernels.top_k(logits, 1)
        return values[:, 0], ids[:, 0]
    if size % _CHUNK:
        values, ids = logits.max(-1)
        return values, ids
    chunks = logits.reshape(rows, size // _CHUNK, _CHUNK)
    chunk = chunks.amax(-1).argmax(-1, keepdim=True)
    values, index = chunks.take_along_dim(chunk[..., None], dim=1)[:, 0].max(-1)
    return values, chunk[:, 0] * _CHUNK + index
