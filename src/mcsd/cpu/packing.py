"""Packing: known decoder layers are fused, and linear layers replaced by packed ones, as a weight plan says."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from mcsd.cpu.gguf_linear import GgufLinear
from mcsd.cpu.native_linear import NativeLinear
from mcsd.cpu.onednn_linear import Bf16Linear, Int8Linear
from mcsd.cpu.packed_linear import PackedLinear
from mcsd.cpu.weight_plan import WeightPlan
from mcsd.kernels import WeightFormat
from mcsd.models.fusion import fuse
from mcsd.models.unmodified import is_plain_linear

Pack = Callable[[str, nn.Linear], PackedLinear]
"""Makes the packed layer of a linear layer, given its name in the model."""

_CALLERS = ("transformers.", "mcsd.")
"""Packages whose modules call linear layers and never read their weights. Adapters, say, may read them."""


def pack_linear(linear: nn.Linear, plan: WeightPlan, quantized: tuple[Tensor, Tensor] | None = None) -> PackedLinear:
    """The packed layer of a linear layer.

    Args:
        linear: the layer; its weight may be freed afterwards.
        plan: a plan that packs.
        quantized: `mcsd.cpu.quantization.quantize_int8` of its weight, if known; for formats with int8 weights.
    """
    if plan.format is WeightFormat.GGUF:
        return GgufLinear.quantized(linear)
    if plan.native:
        assert plan.format is not None
        return NativeLinear.packed(linear, plan.format, quantized)
    if plan.format is None:
        return Bf16Linear(linear)
    assert plan.format in (WeightFormat.W8A8, WeightFormat.W8A16), plan.format
    return Int8Linear(linear, plan.format is WeightFormat.W8A16, quantized)


def pack(network: nn.Module, plan: WeightPlan, make: Pack | None = None) -> None:
    """Fuse known layers of a network and replace its plain linear layers in place, freeing each weight.

    An output matrix that is tied to the embeddings is then in memory twice: a fifth of a small model's weights, for
    products of few rows that are twice as fast.

    Args:
        network: of transformers, or a draft head.
        plan: a plan that packs.
        make: makes packed layers; by default `pack_linear`.
    """
    fuse(network)
    for path, parent, name, linear in list(packable_linears(network)):
        setattr(parent, name, make(path, linear) if make else pack_linear(linear, plan))


def packable_linears(network: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Linear]]:
    """The linear layers that are packed: each with its path in the network, its parent and its name there."""
    for path, parent in network.named_modules():
        if type(parent).__module__.startswith(_CALLERS):
            for name, child in parent.named_children():
                if is_plain_linear(child):
                    yield f"{path}.{name}" if path else name, parent, name, child
