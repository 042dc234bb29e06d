"""Fused operations of decoder layers for the few tokens of a tree, as Triton kernels.

A CUDA graph can capture every function here: none waits for the device, and shapes alone decide what is launched.
Inputs are float32, bfloat16 or float16; the kernels compute in float32. This module imports triton on first use.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

_MIN_CAPABILITY = (8, 0)

_INTERPRETER_SMS = 132
"""Streaming multiprocessors assumed for CPU tensors, which only triton's interpreter runs."""

_TILE_BYTES = 1 << 14
"""Size of a block of keys; an SM holds several of these and as many values."""

_MAX_BLOCK, _MIN_BLOCK = 64, 32
"""Columns of a block. `_TILE_BYTES` may allow fewer."""

_MAX_ROWS, _MIN_ROWS = 64, 16
"""Query rows of a program. Tensor cores need blocks of 16."""

_MAX_SPLITS = 64


def is_available(device: torch.device) -> bool:
    """Whether these kernels run on a device: a CUDA card of compute capability 8.0 or more, and triton is installed."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= _MIN_CAPABILITY and _has_triton()


class AttentionLaunch(NamedTuple):
    """How `tree_attention` is launched.

    Attributes:
        rows: query rows of a program, a power of two of at least 16.
        block: columns of a block, a power of two of at least 16.
        splits: parts of the columns that run in parallel.
        warps, stages: of each program.
        combine_warps: of the kernel that combines the splits.
    """

    rows: int
    block: int
    splits: int
    warps: int = 4
    stages: int = 2
    combine_warps: int = 2


def attention_launch(queries: Tensor, keys: Tensor) -> AttentionLaunch:
    """The launch of `tree_attention` for arguments of these shapes: some two programs for each SM."""
    batch, tokens, heads, size = queries.shape
    kv_heads, columns = keys.shape[1:3]
    sms = _sms(queries.device)
    row_bytes = _next_power_of_2(size) * queries.element_size()
    query_rows = tokens * (heads // kv_heads)
    rows = min(_MAX_ROWS, max(_MIN_ROWS, _next_power_of_2(query_rows)))
    block = min(_MAX_BLOCK, max(_MIN_ROWS, _TILE_BYTES // row_bytes))
    if queries.dtype == torch.float32:
        # Float32 products do not run on tensor cores; their operands are kept in registers.
        block = min(block, _MIN_BLOCK)
        rows = min(rows, block)
    programs = batch * kv_heads * -(-query_rows // rows)
    while block > _MIN_BLOCK and programs * -(-columns // block) < sms * 3 // 2:
        block //= 2
    splits = max(1, min(-(-columns // block), _MAX_SPLITS, (2 * sms + programs // 2) // programs))
    return AttentionLaunch(rows, block, splits)


def tree_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    lengths: Tensor,
    in_flight: int,
    scaling: float,
    launch: AttentionLaunch | None = None,
) -> Tensor:
    """Scaled dot-product attention of the tokens of a tree; query heads share key and value heads.

    It is flash-decoding (Dao et al. 2023): programs attend to splits of the columns, then a second kernel combines
    them. Query heads that share a key head are rows of one product, so keys and values are read once. Each sequence
    divides its own columns, those below ``lengths[b] + in_flight``, among the splits. Other columns are not read.

    Args:
        queries: ``[B, n, heads, size]``, the last dimension contiguous.
        keys, values: ``[B, kv heads, columns, size]``, the last dimension contiguous.
        mask: ``[B, 1, n, columns]``, the last dimension contiguous: 0, or a negative number where a token does not
            attend to a column. The number itself does not matter.
        lengths: int64 ``[B]``: committed tokens of each sequence.
        in_flight: columns after the committed tokens that hold keys and values.
        scaling: of the scores.
        launch: overrides `attention_launch`.

    Returns:
        ``[B, n, heads * size]``, contiguous. A row that attends to nothing is 0.
    """
    _require_contiguous_rows(queries, keys, values, mask)
    code = _code()
    batch, tokens, heads, size = queries.shape
    kv_heads, columns = keys.shape[1:3]
    group = heads // kv_heads
    rows, block, splits, warps, stages, combine_warps = launch or attention_launch(queries, keys)
    row_blocks = -(-tokens * group // rows)
    padded = max(16, _next_power_of_2(size))
    out = queries.new_empty(batch, tokens, heads * size)
    # A single split writes the output itself; these are placeholders then.
    partial, statistics = lengths, lengths
    if splits > 1:
        partial = torch.empty(batch * tokens * heads * splits * size, dtype=torch.float32, device=queries.device)
        statistics = torch.empty(batch * tokens * heads * splits * 2, dtype=torch.float32, device=queries.device)
    with _on_device_of(queries):
        code.attention_kernel[(splits * row_blocks, kv_heads, batch)](
            *(queries, keys, values, mask, lengths, out, partial, statistics),
            *queries.stride()[:3],
            *keys.stride()[:3],
            *values.stride()[:3],
            mask.stride(0),
            mask.stride(2),
            lengths.stride(0),
            scaling * math.log2(math.e),
            tokens,
            columns,
            in_flight,
            splits,
            row_blocks,
            single=splits == 1,
            group=group,
            size=size,
            padded=padded,
            rows=rows,
            block=block,
            num_warps=warps,
            num_stages=stages,
        )
        if splits > 1:
            code.combine_kernel[(batch * tokens * heads,)](
                *(partial, statistics, lengths, out),
                lengths.stride(0),
                tokens * heads,
                columns,
                in_flight,
                splits,
                size=size,
                padded=padded,
                block=block,
                padded_splits=_next_power_of_2(splits),
                num_warps=combine_warps,
            )
    return out


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    heads: int,
    kv_heads: int,
) -> Tensor:
    """Apply RoPE to queries and keys; write keys and values to the cache.

    Args:
        qkv: ``[B, n, (heads + 2 * kv_heads) * size]``, contiguous: heads of queries, then of keys, then of values.
        cos, sin: ``[B, n, 1, size]`` of `mcsd.models.fusion.FusedRotary`, which negates the first half of the sines.
        keys, values: ``[B, kv_heads, columns, size]`` of the cache, written in place.
        slots: int64 ``[B, n]``: the column of each token.
        heads, kv_heads: how many.

    Returns:
        The rotated queries ``[B, n, heads, size]``, contiguous.
    """
    _require_contiguous_rows(cos, sin, keys, values)
    if not qkv.is_contiguous():
        raise ValueError("qkv is not contiguous")
    batch, tokens, width = qkv.shape
    size = width // (heads + 2 * kv_heads)
    queries = qkv.new_empty(batch, tokens, heads, size)
    padded = _next_power_of_2(size // 2)
    block = max(1, 256 // padded)  # One warp loads 8 elements of each half in each thread.
    with _on_device_of(qkv):
        _code().rotate_kernel[(batch * tokens, -(-(heads + 2 * kv_heads) // block))](
            *(qkv, cos, sin, keys, values, slots, queries),
            *cos.stride()[:2],
            *sin.stride()[:2],
            *keys.stride()[:3],
            *values.stride()[:3],
            *slots.stride(),
            tokens,
            heads=heads,
            kv_heads=kv_heads,
            half=size // 2,
            padded=padded,
            block=block,
            num_warps=1,
        )
    return queries


def gated_silu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``, ``[..., 2 * I]`` to ``[..., I]``: the gate is the first half."""
    width = gate_up.shape[-1] // 2
    rows = gate_up.reshape(-1, 2 * width)
    _require_contiguous_rows(rows)
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    block = 1024
    with _on_device_of(gate_up):
        _code().silu_kernel[(len(rows), -(-width // block))](rows, out, rows.stride(0), width, block=block, num_warps=4)
    return out


def _require_contiguous_rows(*tensors: Tensor) -> None:
    if any(tensor.shape[-1] > 1 and tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError("the last dimension is not contiguous")


def _on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


@cache
def _sms(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETER_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _has_triton() -> bool:
    try:
        _code()
    except ImportError:
        return False
    return True


@cache
def _code() -> ModuleType:
    from mcsd.cuda import triton_code

    return triton_code
