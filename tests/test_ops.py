"""Softmax, top-k and argmax against torch, by the library and by the kernels where they are available."""

import pytest
import torch

from mcsd.ops import argmax, softmax, top_k


@pytest.mark.parametrize("size", [64, 100, 2**12, 2**12 + 1, 49152])
def test_top_k_is_that_of_torch(size: int) -> None:
    """With equal logits, masked ones and NaN; all of the largest may be neighbours."""
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(6, size, generator=generator)
    rows[1] = rows[1].round()
    rows[2] = -torch.inf
    rows[2, 5:9] = 1.0
    rows[3, 17] = torch.nan
    rows[4] = torch.arange(size)
    rows[5] = 0
    values, ids = top_k(rows, 16)
    numbers = [0, 1, 2, 4, 5]
    assert torch.equal(values[numbers], rows[numbers].topk(16).values)
    assert torch.equal(rows.gather(1, ids)[numbers], values[numbers])
    assert values[3, 0].isnan()
    assert all(len(set(row)) == 16 for row in ids.tolist())
    assert top_k(rows[:0], 16)[1].shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 100, 2**12, 49152])
def test_argmax_is_the_first_of_equal_logits(size: int, dtype: torch.dtype) -> None:
    rows = torch.randn(5, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    rows[1] = rows[1].round()
    rows[2] = -torch.inf
    rows[3, 17] = torch.nan
    rows[4, 3:] = rows[4].max() + 1
    values, ids = argmax(rows)
    for row in (0, 1, 2, 4):
        assert values[row] == rows[row].max()
        assert ids[row] == (rows[row] == rows[row].max()).nonzero()[0, 0]
    assert values[3].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [5, 2**14])
def test_softmax_divides_by_each_temperature(size: int, dtype: torch.dtype) -> None:
    logits = 3 * torch.randn(3, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    temperature = torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64)
    wide = logits.double()
    for given, expected in ((None, wide), (temperature, wide / temperature[:, None])):
        found = softmax(logits, given)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.double(), expected.softmax(-1), rtol=0, atol=1e-6)
