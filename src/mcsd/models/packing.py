"""Weights in the layout that the CPU's bfloat16 matrix kernels want, so that no forward has to reorder them."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mcsd import kernels
from mcsd.models import native
from mcsd.models.fusion import fuse
from mcsd.models.product import Product
from mcsd.models.quantization import Int8Linear, quantizable

_Form = TypeVar("_Form")

_CLEARLY = 0.8
"""The share of another form's time that is less, whatever disturbs both: the form that text is written in must be the
same the next time."""

_ROWS = 16
"""Rows of the products that the layout is chosen for: about one tree."""


class PackedLinear(Product):
    """A linear layer on oneDNN's own weight layout; computes what ``nn.Linear`` does, in bfloat16.

    Args:
        linear: the layer; its weight may be freed afterwards.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(len(linear.weight))
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return self.product(states)

    def multiply(self, states: Tensor) -> Tensor:
        """See `Product.multiply`."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(states, self.weight, self.bias, "none", [], "")
        return out

    def dense(self) -> Tensor:
        """See `Product.dense`."""
        return self.weight.to_dense()


def packable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine has bfloat16 kernels with a layout of their own."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


Layer = Callable[[nn.Linear], nn.Module]
"""Makes what stands for a linear layer."""


def rounds(device: torch.device, dtype: torch.dtype, draft: bool, quantize: str | None) -> bool:
    """Whether linear layers are rounded.

    A draft in bfloat16 is where the machine can: its q changes a little, the law of what is said does not.
    """
    return quantize is not None or (draft and dtype == torch.bfloat16 and quantizable(device))


def layer_for(device: torch.device, dtype: torch.dtype, draft: bool, quantize: str | None) -> Layer | None:
    """What stands for linear layers; None: they themselves."""
    if rounds(device, dtype, draft, quantize):
        return int8_layer(fine=not draft)
    if not packable(device, dtype):
        return None
    own = not torch.cpu._is_avx512_bf16_supported() and kernels.available()
    return partial(native.NativeLinear, kind=native.Kind.SHORTS) if own else PackedLinear


def int8_layer(fine: bool) -> Callable[..., Product]:
    """What stands for linear layers in int8, with states of two bytes if they are to be ``fine``.

    It takes a linear layer and, if they are known, its rounded weights as ``rounded``.
    """
    if kernels.available():
        return partial(native.NativeLinear, kind=native.Kind.FINE_BYTES if fine else native.Kind.BYTES)
    return partial(Int8Linear, fine=fine)


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which products of many rows are done soonest: bfloat16 or float32.

    On a CPU that has bfloat16 this is measured: there are those that multiply in it at twice the rate of float32, and
    those that need twice the time.
    """
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    if not packable(device, torch.bfloat16):
        return torch.float32
    return _soonest({dtype: _product_seconds(dtype, None) for dtype in (torch.float32, torch.bfloat16)})


def fastest_form(device: torch.device) -> tuple[torch.dtype, str | None]:
    """The dtype and quantization in which a model runs soonest with many rows; measured as `fastest_dtype` is."""
    if device.type != "cpu":
        return fastest_dtype(device), None
    forms: list[tuple[torch.dtype, str | None]] = [(torch.float32, None)]
    if packable(device, torch.bfloat16):
        forms.append((torch.bfloat16, None))
    if quantizable(device):
        forms.append((torch.float32, "int8"))
    return _soonest({form: _product_seconds(form[0], layer_for(device, form[0], False, form[1])) for form in forms})


def _soonest(seconds: dict[_Form, float]) -> _Form:
    """The fastest form; one that rounds more than those before it only where it is `_CLEARLY` faster."""
    chosen, *others = seconds
    for form in others:
        if seconds[form] < _CLEARLY * seconds[chosen]:
            chosen = form
    return chosen


def _product_seconds(dtype: torch.dtype, layer: Layer | None) -> float:
    linear = nn.Linear(1024, 1024, bias=False, dtype=dtype).requires_grad_(False)
    product, states = layer(linear) if layer else linear, torch.ones(128, 1024, dtype=dtype)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        product(states)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def pack(model: nn.Module, layer: Layer) -> None:
    """Replace the linear layers of a model on the CPU in place, one by one, freeing each weight.

    Before that, layers of a known kind are made of fewer and larger ones: see `mcsd.models.fusion`.

    An output matrix that is tied to the embedding is then in memory twice. It is worth it: a fifth of a small model's
    weights, and twice as fast for the few rows of a tree.
    """
    fuse(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, layer(child))
    native.replace_layers(model)


def weight_bytes(model: nn.Module) -> int:
    """What a forward of a few tokens reads of a model: all its weights but the embeddings, of which it reads rows."""
    total = 0
    for module in model.modules():
        if isinstance(module, Product):
            total += module.weight.numel() * module.weight.element_size()
        elif not isinstance(module, nn.Embedding):
            total += sum(parameter.nbytes for parameter in module.parameters(recurse=False))
    return total


def dense_weight(linear: Any) -> Tensor:
    """The weight ``[out, in]`` of a linear layer, packed or not; in float32 if it is rounded to bytes or half bytes."""
    return linear.dense() if isinstance(linear, Product) else linear.weight.detach()
