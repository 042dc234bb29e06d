"""The compiled library, and the kernels for distributions; those for layers are tested in ``tests/cpu``."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mcsd import errors, kernels
from mcsd.cpu.onednn_linear import Int8Linear
from mcsd.cpu.packing import pack_linear
from mcsd.cpu.weight_plan import Role, plan_weights
from mcsd.kernels.library import _loaded

CPU = torch.device("cpu")
LARGE = [2**14, 2**14 + 17, 49152, 151936]
"""Vocabulary sizes."""

DTYPES = pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no kernels for this CPU")


def logits_of(rows: int, size: int, dtype: torch.dtype) -> Tensor:
    return (4 * torch.randn(rows, size, generator=torch.Generator().manual_seed(size))).to(dtype)


@DTYPES
@pytest.mark.parametrize("size", LARGE)
def test_softmax(size: int, dtype: torch.dtype) -> None:
    """Exponents are rounded by 2**-23, so their powers by up to 87 times that; powers below exp(-87) are 0."""
    logits = logits_of(6, size, dtype)
    logits[1, :-3] = -torch.inf
    logits[2, 7] = 3e4
    factors = torch.tensor([1, 0.5, 1, 3.7, 1e30, 1e-30])
    for given in (None, factors):
        found = kernels.softmax(logits, given)
        powers = logits.double() - logits.double().amax(-1, keepdim=True)
        expected = (powers if given is None else powers * given[:, None]).softmax(-1)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-37)
        assert (found.double() - expected).abs().sum(-1).max() < 4e-6
        assert (found[1, :-3] == 0).all()
        assert (found.sum(-1) - 1).abs().max() < 1e-5


@DTYPES
def test_softmax_of_logits_without_a_finite_maximum_is_nan(dtype: torch.dtype) -> None:
    logits = logits_of(6, LARGE[1], dtype)
    logits[0, 3], logits[1, -1], logits[2], logits[4, 5000] = torch.nan, torch.nan, -torch.inf, torch.inf
    for factors in (None, torch.full((6,), 0.3)):
        found = kernels.softmax(logits, factors)
        assert found[[0, 1, 2, 4]].isnan().all()
        assert not found[[3, 5]].isnan().any()


@DTYPES
def test_the_result_of_a_row_depends_neither_on_other_rows_nor_on_threads(dtype: torch.dtype) -> None:
    logits = logits_of(5, LARGE[1], dtype)
    factors = torch.tensor([1, 2, 0.1, 1, 0.7])
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            together = kernels.softmax(logits, factors), *kernels.top_k(logits, 64)
            for row in range(5):
                own = slice(row, row + 1)
                alone = kernels.softmax(logits[own], factors[own]), *kernels.top_k(logits[own], 64)
                assert all(torch.equal(a[own], b) for a, b in zip(together, alone, strict=True))
            seen.append(together)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@DTYPES
@pytest.mark.parametrize("count", [1, 2, 64, 256])
@pytest.mark.parametrize("size", LARGE)
def test_top_k(size: int, count: int, dtype: torch.dtype) -> None:
    """Equal and masked logits, all in one chunk, rising and falling; of equal ones the first comes first."""
    logits = logits_of(8, size, dtype)
    logits[1] = logits[1].round()
    logits[2] = -torch.inf
    logits[3, 100:] = -torch.inf
    logits[4] = torch.arange(size) / size
    logits[5] = -torch.arange(size) / size
    logits[6] = 0
    logits[7, -1] = torch.inf
    values, tokens = kernels.top_k(logits, count)
    expected = logits.float().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :count])
    assert torch.equal(tokens, expected.indices[:, :count])


@DTYPES
@pytest.mark.parametrize("token", [0, 4095, 4096, -1])
def test_top_k_of_nan(token: int, dtype: torch.dtype) -> None:
    logits = logits_of(2, LARGE[1], dtype)
    logits[0, token] = torch.nan
    values, tokens = kernels.top_k(logits, 64)
    assert values[0].isnan().all()
    assert len(set(tokens[0].tolist())) == 64
    assert not values[1].isnan().any()


def test_wrong_sizes_are_refused() -> None:
    logits = torch.zeros(2, LARGE[0])
    with pytest.raises(ValueError, match="1 numbers"):
        kernels.softmax(logits, torch.ones(1))
    for count in (0, LARGE[0] // 64 + 1):
        with pytest.raises(ValueError, match="are possible"):
            kernels.top_k(logits, count)


def test_small_vocabularies_and_other_dtypes_are_not_supported() -> None:
    assert kernels.supported(torch.zeros(1, LARGE[0]))
    for logits in (torch.zeros(1, LARGE[0] - 1), torch.zeros(1, LARGE[0]).double(), torch.zeros(1, LARGE[0]).half()):
        assert not kernels.supported(logits)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for compiled kernels, empty; the library that this process has loaded is set aside meanwhile."""
    monkeypatch.setenv("MCSD_HOME", str(tmp_path))
    _loaded.cache_clear()
    yield tmp_path / "compiled"
    _loaded.cache_clear()


def test_kernels_are_compiled_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.available()
    (file,) = empty_cache.iterdir()
    assert file.suffix == ".so"
    _loaded.cache_clear()

    def unneeded(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", unneeded)
    assert kernels.available()


@pytest.mark.thorough
def test_kernels_that_cannot_be_loaded_are_compiled_again(empty_cache: Path) -> None:
    assert kernels.available()
    (file,) = empty_cache.iterdir()
    # This process still uses it, so it must not be overwritten.
    file.unlink()
    file.write_bytes(b"")
    command = [sys.executable, "-c", "from mcsd import kernels; assert kernels.available()"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert file.stat().st_size > 0


def test_kernels_in_a_folder_that_others_can_write_are_not_loaded(empty_cache: Path) -> None:
    empty_cache.mkdir()
    empty_cache.chmod(0o777)
    assert kernels.available()
    assert not list(empty_cache.iterdir())


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "sh -c 'exit 1'"])
def test_without_a_compiler_a_warning_is_given_and_pytorch_s_kernels_run(
    compiler: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(errors.McsdWarning, match="slower kernels"):
        plan = plan_weights(CPU, torch.bfloat16, Role.DRAFT)
    # A second warning would be an error here.
    assert plan_weights(CPU, torch.bfloat16, Role.DRAFT) == plan
    assert isinstance(pack_linear(nn.Linear(4, 4), plan), Int8Linear)
    assert not kernels.supported(torch.zeros(1, LARGE[0]))
    assert not list(empty_cache.glob("*"))
