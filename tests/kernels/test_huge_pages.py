"""Memory for weights in huge pages."""

import gc
import mmap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mcsd import kernels
from mcsd.cpu.native_linear import NativeLinear
from mcsd.kernels.gemm import WeightFormat
from mcsd.kernels.huge_pages import zeros
from support.decoders import PACKED_FORMATS


def test_memory_is_unmapped() -> None:
    """An arena with its last small tensor, the mapping of a large tensor with it."""
    for shape in ((1000,), (9_000_000,)):
        some, other = zeros(*shape), zeros(*shape)
        addresses = some.data_ptr(), other.data_ptr()
        del some
        gc.collect()
        other.fill_(1)
        del other
        gc.collect()
        assert not any(mapped(address) for address in addresses)


def mapped(address: int) -> bool:
    """Whether an address lies in an anonymous mapping."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return any(
        int(start, 16) <= address < int(end, 16)
        for start, end in (line[0].split("-") for line in lines if len(line) == 5)
    )


def flags(tensor: Tensor) -> list[str]:
    """The ``VmFlags`` of the mapping that a tensor lies in."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, end = (int(address, 16) for address in first.split("-"))
            found = start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= end
        elif found and first == "VmFlags:":
            return rest
    raise AssertionError("the tensor is in no mapping")


def test_tensors_do_not_overlap_and_outlive_each_other() -> None:
    shapes = [(3,), (5, 7), (1000, 1001), (9_000_000,), (2, 2, 2)] * 5
    made = [zeros(*shape) for shape in shapes]
    assert all(tensor.shape == shape and not tensor.any() for tensor, shape in zip(made, shapes, strict=True))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in made)
    for number, tensor in enumerate(made):
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(made))
    kept = {number: made[number] for number in (1, 13, 24)}
    made.clear()
    gc.collect()
    later = [zeros(1_000_000).fill_(-1) for _ in range(20)]
    assert all((tensor == number).all() for number, tensor in kept.items())
    assert all((tensor == -1).all() for tensor in later)
    assert zeros(0, 4).shape == (0, 4)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="no huge pages here")
@pytest.mark.skipif(not kernels.available(), reason="no kernels for this CPU")
@pytest.mark.parametrize("weight_format", PACKED_FORMATS)
def test_weights_may_have_huge_pages(weight_format: WeightFormat) -> None:
    weight = NativeLinear.packed(nn.Linear(256, 64), weight_format).weight
    assert "hg" in flags(weight)
    # Memory of torch may be some that NumPy has used, which asks for huge pages too.
    assert "hg" not in flags(torch.frombuffer(mmap.mmap(-1, 1 << 22), dtype=torch.uint8))


def test_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("mcsd.kernels.huge_pages._allocator.allocate", refuse)
    assert torch.equal(zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32))
