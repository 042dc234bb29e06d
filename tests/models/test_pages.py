"""Memory for weights."""

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mcsd import kernels
from mcsd.models.native import Kind, NativeLinear
from mcsd.models.native.pages import zeros


def test_memory_is_given_back() -> None:
    """Of small tensors with the last one that shares it, of large ones at once."""
    for shape in ((1000,), (9_000_000,)):
        some, other = zeros(*shape), zeros(*shape)
        places = some.data_ptr(), other.data_ptr()
        del some
        gc.collect()
        other.fill_(1)
        del other
        gc.collect()
        assert not any(mapped(place) for place in places)


def mapped(place: int) -> bool:
    """Whether there is memory of a mapping of its own."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return any(
        int(start, 16) <= place < int(end, 16)
        for start, end in (line[0].split("-") for line in lines if len(line) == 5)
    )


def flags(tensor: Tensor) -> list[str]:
    """What Linux says of the memory that a tensor lies in."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, end = (int(place, 16) for place in first.split("-"))
            here = start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= end
        elif here and first == "VmFlags:":
            return rest
    raise AssertionError("it lies nowhere")


def test_places_are_apart_and_outlive_each_other() -> None:
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


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="no large pages here")
@pytest.mark.skipif(not kernels.available(), reason="no kernels for this CPU")
@pytest.mark.parametrize("kind", Kind)
def test_weights_may_have_large_pages(kind: Kind) -> None:
    weight = NativeLinear(nn.Linear(256, 64), kind).weight
    assert "hg" in flags(weight)
    assert "hg" not in flags(torch.zeros(2**20))


def test_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("mcsd.models.native.pages._pieces.place", refuse)
    assert torch.equal(zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32))
