"""The library of our own kernels, and those for distributions; `models/test_native` has those for layers."""

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
from mcsd.kernels.library import _loaded
from mcsd.models.packing import layer_for
from mcsd.models.quantization import Int8Linear

CPU = torch.device("cpu")
LARGE = [2**14, 2**14 + 17, 49152, 151936]
"""Sizes of vocabularies."""

DTYPES = pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no kernels for this CPU")


def logits_of(rows: int, size: int, dtype: torch.dtype) -> Tensor:
    return (4 * torch.randn(rows, size, generator=torch.Generator().manual_seed(size))).to(dtype)


@DTYPES
@pytest.mark.parametrize("size", LARGE)
def test_softmax(size: int, dtype: torch.dtype) -> None:
    """An exponent is rounded by 2**-23 of itself, up to 87 times that in what it gives; beyond that there is 0."""
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
def test_softmax_without_a_distribution(dtype: torch.dtype) -> None:
    logits = logits_of(6, LARGE[1], dtype)
    logits[0, 3], logits[1, -1], logits[2], logits[4, 5000] = torch.nan, torch.nan, -torch.inf, torch.inf
    for factors in (None, torch.full((6,), 0.3)):
        found = kernels.softmax(logits, factors)
        assert found[[0, 1, 2, 4]].isnan().all()
        assert not found[[3, 5]].isnan().any()


@DTYPES
def test_a_row_is_what_it_is_alone_with_any_threads(dtype: torch.dtype) -> None:
    logits = logits_of(5, LARGE[1], dtype)
    factors = torch.tensor([1, 2, 0.1, 1, 0.7])
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            together = kernels.softmax(logits, factors), *kernels.largest(logits, 64)
            for row in range(5):
                own = slice(row, row + 1)
                alone = kernels.softmax(logits[own], factors[own]), *kernels.largest(logits[own], 64)
                assert all(torch.equal(a[own], b) for a, b in zip(together, alone, strict=True))
            seen.append(together)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@DTYPES
@pytest.mark.parametrize("count", [1, 2, 64, 256])
@pytest.mark.parametrize("size", LARGE)
def test_largest(size: int, count: int, dtype: torch.dtype) -> None:
    """Equal ones, masked ones, all of one part, rising and falling; the first of equal ones comes first."""
    logits = logits_of(8, size, dtype)
    logits[1] = logits[1].round()
    logits[2] = -torch.inf
    logits[3, 100:] = -torch.inf
    logits[4] = torch.arange(size) / size
    logits[5] = -torch.arange(size) / size
    logits[6] = 0
    logits[7, -1] = torch.inf
    values, places = kernels.largest(logits, count)
    expected = logits.float().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :count])
    assert torch.equal(places, expected.indices[:, :count])


@DTYPES
@pytest.mark.parametrize("place", [0, 4095, 4096, -1])
def test_largest_of_what_is_no_number(place: int, dtype: torch.dtype) -> None:
    logits = logits_of(2, LARGE[1], dtype)
    logits[0, place] = torch.nan
    values, places = kernels.largest(logits, 64)
    assert values[0].isnan().all()
    assert len(set(places[0].tolist())) == 64
    assert not values[1].isnan().any()


def test_what_does_not_fit_is_refused() -> None:
    logits = torch.zeros(2, LARGE[0])
    with pytest.raises(ValueError, match="1 numbers"):
        kernels.softmax(logits, torch.ones(1))
    for count in (0, LARGE[0] // 64 + 1):
        with pytest.raises(ValueError, match="none"):
            kernels.largest(logits, count)


def test_other_logits_are_left_to_torch() -> None:
    assert kernels.suits(torch.zeros(1, LARGE[0]))
    for logits in (torch.zeros(1, LARGE[0] - 1), torch.zeros(1, LARGE[0]).double(), torch.zeros(1, LARGE[0]).half()):
        assert not kernels.suits(logits)


@pytest.fixture
def no_kernels_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where kernels will be kept; what this process has loaded already is forgotten meanwhile."""
    monkeypatch.setenv("MCSD_HOME", str(tmp_path))
    _loaded.cache_clear()
    yield tmp_path / "compiled"
    _loaded.cache_clear()


def test_kernels_are_compiled_once(no_kernels_yet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.available()
    (kept,) = no_kernels_yet.iterdir()
    assert kept.suffix == ".so"
    _loaded.cache_clear()

    def unneeded(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", unneeded)
    assert kernels.available()


def test_kernels_that_cannot_be_loaded_are_compiled_again(no_kernels_yet: Path) -> None:
    assert kernels.available()
    (kept,) = no_kernels_yet.iterdir()
    # This process has it in use.
    kept.unlink()
    kept.write_bytes(b"")
    later = [sys.executable, "-c", "from mcsd import kernels; assert kernels.available()"]
    subprocess.run(later, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert kept.stat().st_size > 0


def test_kernels_that_others_could_have_written_are_not_run(no_kernels_yet: Path) -> None:
    no_kernels_yet.mkdir()
    no_kernels_yet.chmod(0o777)
    assert kernels.available()
    assert not list(no_kernels_yet.iterdir())


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "sh -c 'exit 1'"])
def test_without_a_compiler_the_libraries_kernels_run_and_a_line_says_so(
    compiler: str, no_kernels_yet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(errors.McsdWarning, match="slower kernels"):
        made = layer_for(CPU, torch.bfloat16, draft=True, quantize=None)
    # Once is enough; here a second warning is an error.
    assert layer_for(CPU, torch.bfloat16, draft=True, quantize=None) is not None
    assert made is not None
    assert isinstance(made(nn.Linear(4, 4)), Int8Linear)
    assert not kernels.suits(torch.zeros(1, LARGE[0]))
    assert not list(no_kernels_yet.glob("*"))
