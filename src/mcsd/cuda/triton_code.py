# mypy: ignore-errors
"""The device code of `mcsd.cuda.triton_kernels`. It imports triton, so only that module imports it, and late.

All kernels compute in float32 and store in the dtype of their outputs. Every last dimension is contiguous. ``size`` is
the head size. Constants named ``block`` or ``padded`` are powers of two, and masks hide the surplus.
"""

import triton
import triton.language as tl


@triton.jit
def columns_per_split(limit, block: tl.constexpr, splits):
    """Columns of each split, in whole blocks: the first splits share ``limit`` columns, the others are empty."""
    return tl.maximum(tl.cdiv(tl.cdiv(limit, block), splits), 1) * block


@triton.jit(do_not_specialize=["tokens", "columns", "in_flight", "splits", "row_blocks"])
def attention_kernel(
    queries,
    keys,
    values,
    mask,
    lengths,
    out,
    partial,
    statistics,
    query_stride_b,
    query_stride_n,
    query_stride_h,
    key_stride_b,
    key_stride_h,
    key_stride_c,
    value_stride_b,
    value_stride_h,
    value_stride_c,
    mask_stride_b,
    mask_stride_n,
    length_stride,
    scale,
    tokens,
    columns,
    in_flight,
    splits,
    row_blocks,
    single: tl.constexpr,
    group: tl.constexpr,
    size: tl.constexpr,
    padded: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
):
    """Attention of one block of query rows to one split of the columns of one key-value head.

    Query row ``r`` is head ``r % group`` of the group of token ``r // group``.

    Grid: ``(splits * row_blocks, kv heads, B)``.

    Args:
        queries: ``[B, tokens, heads, size]``.
        keys, values: ``[B, kv heads, columns, size]``.
        mask: ``[B, tokens, columns]``; negative entries are hidden.
        lengths: ``[B]``.
        out: ``[B, tokens, heads, size]`` contiguous, written if there is a single split.
        partial: float32 ``[B, tokens, heads, splits, size]`` contiguous: weighted sums of the values of each split.
        statistics: float32 ``[B, tokens, heads, splits, 2]``: maximum score (base 2) and sum of the weights.
        scale: of the scores, times ``log2(e)``.
    """
    split = tl.program_id(0) // row_blocks
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)

    limit = tl.minimum(tl.load(lengths + sequence * length_stride) + in_flight, columns).to(tl.int32)
    width = columns_per_split(limit, block, splits)
    first = split * width
    last = tl.minimum(first + width, limit)

    row = tl.program_id(0) % row_blocks * rows + tl.arange(0, rows)
    token = row // group
    head = kv_head * group + row % group
    is_row = token < tokens
    dim = tl.arange(0, padded)
    query_mask = is_row[:, None]
    if size < padded:
        query_mask = query_mask & (dim < size)[None, :]
    query_rows = sequence * query_stride_b + token.to(tl.int64) * query_stride_n + head.to(tl.int64) * query_stride_h
    query = tl.load(queries + query_rows[:, None] + dim[None, :], mask=query_mask, other=0.0)

    keys += sequence * key_stride_b + kv_head.to(tl.int64) * key_stride_h
    values += sequence * value_stride_b + kv_head.to(tl.int64) * value_stride_h
    mask_rows = mask + sequence * mask_stride_b + (token.to(tl.int64) * mask_stride_n)[:, None]
    column = first + tl.arange(0, block)
    next_bias = tl.load(mask_rows + column[None, :], mask=is_row[:, None] & (column < last)[None, :], other=-1.0)

    # A finite start: rows whose columns are all hidden so far must not compute inf - inf.
    maximum = tl.full([rows], -1e30, tl.float32)
    total = tl.zeros([rows], tl.float32)
    summed = tl.zeros([rows, padded], tl.float32)
    for start in tl.range(first, last, block):
        column = start + tl.arange(0, block)
        is_column = column < last
        cache_mask = is_column[:, None]
        if size < padded:
            cache_mask = cache_mask & (dim < size)[None, :]
        offset = column.to(tl.int64)[:, None]
        key = tl.load(keys + offset * key_stride_c + dim[None, :], mask=cache_mask, other=0.0)
        value = tl.load(values + offset * value_stride_c + dim[None, :], mask=cache_mask, other=0.0)
        # Triton prefetches keys and values only, so the mask is loaded one block ahead here.
        bias = next_bias
        next_column = column + block
        next_bias = tl.load(
            mask_rows + next_column[None, :], mask=is_row[:, None] & (next_column < last)[None, :], other=-1.0
        )
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(bias.to(tl.float32) >= 0.0, score, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(score, 1))
        weight = tl.exp2(score - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weight, 1)
        summed = tl.dot(weight.to(value.dtype), value, summed * decay[:, None], input_precision="ieee")
        maximum = new_maximum

    heads = tl.num_programs(1) * group
    out_row = (sequence * tokens + token) * heads + head
    if single:
        result = summed / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(out + out_row[:, None] * size + dim[None, :], result.to(out.dtype.element_ty), mask=query_mask)
    elif first < limit:
        # The combining kernel ignores empty splits.
        slot = out_row * splits + split
        tl.store(partial + slot[:, None] * size + dim[None, :], summed, mask=query_mask)
        tl.store(statistics + slot * 2, maximum, mask=is_row)
        tl.store(statistics + slot * 2 + 1, total, mask=is_row)


@triton.jit(do_not_specialize=["rows_per_sequence", "columns", "in_flight", "splits"])
def combine_kernel(
    partial,
    statistics,
    lengths,
    out,
    length_stride,
    rows_per_sequence,
    columns,
    in_flight,
    splits,
    size: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
    padded_splits: tl.constexpr,
):
    """Combine the splits of one row of `attention_kernel`. Grid: ``(B * tokens * heads,)``."""
    sequence = (tl.program_id(0) // rows_per_sequence).to(tl.int64)
    length = tl.load(lengths + sequence * length_stride)
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, padded_splits)
    slot = row * splits + split
    # Empty splits are loaded too, so that no load waits for the length; they hold arbitrary memory.
    is_split = split < splits
    maximum = tl.load(statistics + slot * 2, mask=is_split, other=0.0)
    total = tl.load(statistics + slot * 2 + 1, mask=is_split, other=0.0)
    dim = tl.arange(0, padded)
    partial_mask = is_split[:, None]
    if size < padded:
        partial_mask = partial_mask & (dim < size)[None, :]
    summed = tl.load(partial + slot[:, None] * size + dim[None, :], mask=partial_mask, other=0.0)

    limit = tl.minimum(length + in_flight, columns).to(tl.int32)
    filled = is_split & (split * columns_per_split(limit, block, splits) < limit)
    maximum = tl.where(filled, maximum, -1e30)
    weight = tl.exp2(maximum - tl.max(maximum, 0))
    total = tl.sum(tl.where(filled, total * weight, 0.0), 0)
    summed = tl.sum(tl.where(filled[:, None], summed * weight[:, None], 0.0), 0)
    result = summed / tl.where(total > 0.0, total, 1.0)
    tl.store(out + row * size + dim, result.to(out.dtype.element_ty), mask=dim < size)


@triton.jit(do_not_specialize=["tokens"])
def rotate_kernel(
    qkv,
    cos,
    sin,
    keys,
    values,
    slots,
    queries,
    cos_stride_b,
    cos_stride_n,
    sin_stride_b,
    sin_stride_n,
    key_stride_b,
    key_stride_h,
    key_stride_c,
    value_stride_b,
    value_stride_h,
    value_stride_c,
    slot_stride_b,
    slot_stride_n,
    tokens,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    half: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
):
    """Rotate some query and key heads of one token; store keys and values in the cache.

    Grid: ``(B * tokens, blocks of the heads of queries, keys and values)``.

    Args:
        qkv: ``[B, tokens, heads + 2 * kv_heads, 2 * half]`` contiguous.
        cos, sin: ``[B, tokens, 2 * half]``.
        keys, values: ``[B, kv_heads, columns, 2 * half]``.
        slots: ``[B, tokens]``: columns.
        queries: ``[B, tokens, heads, 2 * half]`` contiguous, written.
    """
    row = tl.program_id(0).to(tl.int64)
    sequence = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    head = tl.program_id(1) * block + tl.arange(0, block)
    dim = tl.arange(0, padded)

    cos += sequence * cos_stride_b + token * cos_stride_n + dim
    sin += sequence * sin_stride_b + token * sin_stride_n + dim
    is_dim = dim < half
    cos_first = tl.load(cos, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + half, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + half, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    slot = tl.load(slots + sequence * slot_stride_b + token * slot_stride_n)

    is_head = head < heads + 2 * kv_heads
    source = qkv + (row * (heads + 2 * kv_heads) + head)[:, None] * (2 * half) + dim[None, :]
    stored = is_head[:, None] & is_dim[None, :]
    first = tl.load(source, mask=stored, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=stored, other=0.0).to(tl.float32)

    is_rotated = (head < heads + kv_heads)[:, None]
    rotated_first = tl.where(is_rotated, first * cos_first + second * sin_first, first)
    rotated_second = tl.where(is_rotated, second * cos_second + first * sin_second, second)
    rotated_first = rotated_first.to(queries.dtype.element_ty)
    rotated_second = rotated_second.to(queries.dtype.element_ty)

    is_query = (head < heads)[:, None] & stored
    target = queries + (row * heads + head)[:, None] * (2 * half) + dim[None, :]
    tl.store(target, rotated_first, mask=is_query)
    tl.store(target + half, rotated_second, mask=is_query)

    key_head = head - heads
    is_key = ((key_head >= 0) & (key_head < kv_heads))[:, None] & stored
    target = keys + sequence * key_stride_b + slot * key_stride_c
    target = target + key_head.to(tl.int64)[:, None] * key_stride_h + dim[None, :]
    tl.store(target, rotated_first, mask=is_key)
    tl.store(target + half, rotated_second, mask=is_key)

    value_head = head - heads - kv_heads
    is_value = (value_head >= 0)[:, None] & stored
    target = values + sequence * value_stride_b + slot * value_stride_c
    target = target + value_head.to(tl.int64)[:, None] * value_stride_h + dim[None, :]
    tl.store(target, rotated_first, mask=is_value)
    tl.store(target + half, rotated_second, mask=is_value)


@triton.jit
def silu_kernel(gate_up, out, stride, width, block: tl.constexpr):
    """``silu(gate) * up`` of ``block`` elements of a row. Grid: ``(rows, blocks of the width)``.

    Args:
        gate_up: ``[rows, 2 * width]``, its rows ``stride`` apart.
        out: ``[rows, width]`` contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * block + tl.arange(0, block)
    inside = index < width
    gate = tl.load(gate_up + row * stride + index, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + index, mask=inside, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + index, product.to(out.dtype.element_ty), mask=inside)
