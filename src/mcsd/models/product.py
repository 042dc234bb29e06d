"""Products with weights in a library's own layout, which `torch.compile` has to take as they are.

A compiled function sees an operation ``mcsd::product`` of states and of the number of a layer, so one function serves
all layers, and the weights' layout is nobody's business but the library's.
"""

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

_numbers = count()
_layers: "WeakValueDictionary[int, Product]" = WeakValueDictionary()


class Product(nn.Module):
    """A linear layer whose weight only ``multiply`` can read.

    Args:
        outputs: its size.
    """

    least_rows = 4
    """Rows that fewer are filled up to: oneDNN takes longer for one or two (on a Zen 4, 12 to 15 %) than for four."""

    weight: Tensor
    """In whatever layout."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        number = next(_numbers)
        _layers[number] = self
        self._number = torch.tensor(number)

    def multiply(self, states: Tensor) -> Tensor:
        """``[M, in]`` to ``[M, out]``: of unsigned bytes in float32, else in the states' dtype."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The weight ``[out, in]``; in float32 if it is rounded to bytes or half bytes."""
        raise NotImplementedError

    def product(self, states: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, in compiled functions too."""
        if torch.compiler.is_compiling():
            out: Tensor = torch.ops.mcsd.product(states, self._number, self.outputs)
            return out
        return _multiply(self, states)


def _multiply(layer: Product, states: Tensor) -> Tensor:
    rows = states.flatten(0, -2)
    few = len(rows)
    if 0 < few < layer.least_rows:
        rows = nn.functional.pad(rows, (0, 0, 0, layer.least_rows - few))
    return layer.multiply(rows)[:few].view(*states.shape[:-1], layer.outputs)


def _numbered(states: Tensor, number: Tensor, outputs: int) -> Tensor:
    return _multiply(_layers[int(number)], states)


def _shaped(states: Tensor, number: Tensor, outputs: int) -> Tensor:
    dtype = torch.float32 if states.dtype == torch.uint8 else states.dtype
    return states.new_empty((*states.shape[:-1], outputs), dtype=dtype)


_library: Any = torch.library.Library("mcsd", "DEF")  # type: ignore[no-untyped-call]
_library.define("product(Tensor states, Tensor number, int outputs) -> Tensor")
_library.impl("product", _numbered, "CPU")
torch.library.register_fake("mcsd::product", _shaped)
