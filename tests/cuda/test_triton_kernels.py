"""Triton kernels compute what plain torch computes.

The ``check_`` functions run in processes of their own, see `support.triton_checks`. Tolerances are multiples of half an
ulp, one for each rounding.
"""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from mcsd.cuda.triton_kernels import (
    AttentionLaunch,
    attention_launch,
    gated_silu,
    is_available,
    rotate_and_store,
    tree_attention,
)
from mcsd.models.llama import grouped_query_attention
from support.triton_checks import DEVICE, run_checks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Half an ulp relative to the number; for float32 the error of a sum of a hundred numbers.
HALF_ULP = {torch.float32: 5e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.thorough
@pytest.mark.parametrize("device", ["interpreter", "cuda"])
def test_kernels(device: str) -> None:
    run_checks(__file__, device)


def test_the_module_does_not_import_triton() -> None:
    code = "import sys; from mcsd.cuda import triton_kernels; assert 'mcsd.cuda.triton_code' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_cpu_has_no_kernels() -> None:
    assert not is_available(torch.device("cpu"))


def test_transposed_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="last dimension"):
        gated_silu(torch.zeros(4, 6).T[:2])


class Attention:
    """Random arguments of `tree_attention`.

    Keys and values are views of a larger cache. NaN surrounds the views and fills the columns past the limit of each
    sequence, so a kernel that loads either fails. Hidden columns below the limit hold 1e4: large, as in a cache that
    another text left, and finite. Rows see random columns and their own; the first rows do not see the first half.
    """

    def __init__(
        self,
        lengths: list[int],
        tokens: int,
        heads: int,
        kv_heads: int,
        size: int,
        columns: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(tokens * heads + size)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        batch, self.in_flight, self.scaling = len(lengths), tokens, size**-0.5
        # Not contiguous: [B, heads, n, size] transposed. Scores spread, so that single columns matter.
        self.queries = (2 * normal(batch, heads, tokens, size)).to(dtype).to(DEVICE).transpose(1, 2)
        cache = torch.full((2, 2, batch + 1, kv_heads, columns + 3, size + 8), float("nan"))
        views = cache[1, :, :batch, :, :columns, :size]
        visible = torch.rand(batch, 1, tokens, columns, generator=generator) < 0.7
        visible[:, :, : max(1, tokens // 2), : columns // 2] = False
        stale = torch.rand(batch, 1, columns, 1, generator=generator) < 0.1
        for sequence, length in enumerate(lengths):
            limit = length + tokens
            own = torch.arange(tokens)
            views[:, sequence, :, :limit] = normal(2, kv_heads, limit, size)
            views[:, sequence, :, :limit][:, stale[sequence, :, :limit].expand(kv_heads, -1, size)] = 1e4
            visible[sequence, 0] &= ~stale[sequence, 0, :, 0]
            visible[sequence, :, :, limit:] = False
            visible[sequence, 0, own, length + own] = True
            views[:, sequence, :, length:limit] = normal(2, kv_heads, tokens, size)
        on_device = cache.to(dtype).to(DEVICE)[1, :, :batch, :, :columns, :size]
        self.keys = on_device[0]
        # Values have strides of their own.
        wide = torch.full((batch + 1, kv_heads, columns + 5, size + 16), float("nan"), dtype=dtype, device=DEVICE)
        self.values = wide[:batch, :, :columns, :size].copy_(on_device[1])
        self.visible = visible.to(DEVICE)
        self.mask = torch.zeros(visible.shape, dtype=dtype, device=DEVICE)
        self.mask.masked_fill_(~self.visible, torch.finfo(dtype).min)
        self.lengths = torch.tensor(lengths, device=DEVICE)

    def run(self, launch: AttentionLaunch | None = None) -> Tensor:
        return tree_attention(
            *(self.queries, self.keys, self.values, self.mask, self.lengths, self.in_flight, self.scaling), launch
        )

    def assert_close(self, ours: Tensor) -> None:
        """Weights and output round once each, relative to the weighted sum of absolute values."""
        queries, keys, values = self.queries.double(), self.keys.double(), self.values.double()
        assert keys.isnan().any()
        mask = torch.zeros(self.mask.shape, dtype=torch.double, device=DEVICE)
        mask.masked_fill_(~self.visible, float("-inf"))
        keys, values = keys.nan_to_num(), values.nan_to_num()
        exact = grouped_query_attention(queries, keys, values, mask, self.scaling)
        bound = grouped_query_attention(queries, keys, values.abs(), mask, self.scaling)
        assert ours.dtype == self.queries.dtype
        assert ours.shape == exact.shape
        assert ours.is_contiguous()
        worst = ((ours.double() - exact).abs() / bound).max().item()
        assert worst < 2.1 * HALF_ULP[ours.dtype], f"{worst:.1e} of the sum of absolute values"


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (7, 1)])
@pytest.mark.parametrize(
    ("tokens", "lengths"), [(1, [70]), (1, [70, 0, 33]), (5, [70, 0, 33]), (21, [70]), (21, [20, 0, 9]), (61, [30])]
)
def check_attention(lengths: list[int], tokens: int, heads: int, kv_heads: int) -> None:
    case = Attention(lengths, tokens, heads, kv_heads, 16, 99)
    case.assert_close(case.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 32, 64, 96, 128, 256])
def check_head_sizes(size: int, dtype: torch.dtype) -> None:
    case = Attention([90, 17], 5, 4, 1, size, 101, dtype)
    case.assert_close(case.run())


@pytest.mark.parametrize("splits", [1, 2, 5, 16])
@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("block", [16, 64])
def check_launches(splits: int, rows: int, block: int) -> None:
    """More splits than blocks, blocks that no row sees, and several row blocks."""
    case = Attention([190, 3], 6, 6, 2, 24, 230)
    case.assert_close(case.run(AttentionLaunch(rows, block, splits)))


def check_wholly_hidden_splits() -> None:
    """Each row sees one column, so most splits have none; the numbers are those of float16, whose minimum is small."""
    for dtype in DTYPES:
        case = Attention([200], 3, 2, 2, 16, 203, dtype)
        case.visible[:] = False
        seen = torch.tensor([0, 100, 202], device=DEVICE)
        case.visible[0, 0, torch.arange(3), seen] = True
        case.mask.fill_(torch.finfo(dtype).min).masked_fill_(case.visible, 0)
        expected = case.values[0][:, seen].transpose(0, 1)
        for splits in (1, 8):
            assert torch.equal(case.run(AttentionLaunch(16, 16, splits)).view(3, 2, 16), expected)


def check_rows_that_see_nothing_are_zero() -> None:
    case = Attention([40, 60], 3, 2, 2, 16, 70)
    case.lengths[1] = -3
    for splits in (1, 4):
        out = case.run(AttentionLaunch(16, 16, splits))
        assert not out[1].any()
        assert out[0].isfinite().all()


def check_launch_fills_the_card() -> None:
    """Two programs for each of 132 SMs; many sequences need no splits."""
    keys = torch.empty(8, 32, 512, 128, dtype=torch.bfloat16)
    queries = torch.empty(8, 21, 32, 128, dtype=torch.bfloat16)
    assert attention_launch(queries[:1], keys[:1])[:3] == (32, 64, 8)
    assert attention_launch(queries, keys).splits == 1
    assert attention_launch(queries[:1], keys[:1, :8]) == AttentionLaunch(64, 32, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (7, 1), (12, 3)])
@pytest.mark.parametrize("size", [16, 64, 96, 128])
def check_rotation(dtype: torch.dtype, heads: int, kv_heads: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    for batch, tokens in ((1, 1), (3, 5)):
        width = (heads + 2 * kv_heads) * size
        qkv = torch.randn(batch, tokens, width, generator=generator).to(dtype).to(DEVICE)
        table = torch.randn(2, 40, size, generator=generator).to(dtype).to(DEVICE)
        positions = torch.randint(40, (batch, tokens), generator=generator).to(DEVICE)
        cos, sin = table[:, positions, None].unbind()
        shape = batch + 1, kv_heads, 33
        # Keys and values have strides of their own.
        caches = [torch.full((*shape, size + more), 7.0, dtype=dtype, device=DEVICE) for more in (8, 16)]
        keys, values = (cache[1:, :, 2:, :size] for cache in caches)
        columns = torch.stack([torch.randperm(31, generator=generator)[:tokens] for _ in range(batch)]).to(DEVICE)
        expected = [cache.clone() for cache in caches]
        queries = rotate_and_store(qkv, cos, sin, keys, values, columns, heads, kv_heads)

        parts = qkv.view(batch, tokens, -1, size)
        exact = parts.double() * cos.double() + parts.double().roll(size // 2, dims=-1) * sin.double()
        bound = (parts * cos).double().abs() + (parts.roll(size // 2, dims=-1) * sin).double().abs()
        stored = torch.cat([queries, parts[:, :, heads:]], dim=2)  # Values do not rotate.
        for sequence in range(batch):
            new = keys[sequence, :, columns[sequence]].transpose(0, 1)
            stored[sequence, :, heads : heads + kv_heads] = new
            kept = parts[sequence, :, heads + kv_heads :].transpose(0, 1)
            expected[1][1 + sequence, :, 2 + columns[sequence], :size] = kept
            expected[0][1 + sequence, :, 2 + columns[sequence], :size] = new.transpose(0, 1)
        # Exactly these columns are written.
        assert all(map(torch.equal, caches, expected))
        assert queries.shape == (batch, tokens, heads, size)
        assert queries.is_contiguous()
        rotated = slice(0, heads + kv_heads)
        error = (stored.double() - exact).abs()[:, :, rotated]
        # One rounding.
        assert (error <= 1.1 * HALF_ULP[dtype] * bound[:, :, rotated] + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 2 * 1030), (1, 2 * 16), (2 * 1024,)], ids=str)
def check_gated_silu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate_up = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    gate_up[..., :4] = torch.tensor([-200.0, 200.0, 0.0, -90.0])
    gate_up = gate_up.to(dtype).to(DEVICE)
    gate, up = gate_up.double().chunk(2, dim=-1)
    exact = nn.functional.silu(gate) * up
    ours = gated_silu(gate_up)
    assert ours.dtype == dtype
    # One rounding; results below 1e-6 are subnormal in float16.
    torch.testing.assert_close(ours.double(), exact, rtol=1.1 * HALF_ULP[dtype], atol=1e-6)
