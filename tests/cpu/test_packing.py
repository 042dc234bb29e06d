"""Packing replaces plain linear layers only: an adapter, a hook or a parametrization keeps its effect."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mcsd import kernels
from mcsd.cpu.packing import pack
from mcsd.cpu.weight_plan import WeightPlan, has_bf16_gemm, has_int8_gemm
from mcsd.kernels import WeightFormat
from mcsd.models import LanguageModel, TransformersModel
from mcsd.models.layout import TokenLayout
from support.tiny import tiny

CPU = torch.device("cpu")
IDS = [5, 9, 2, 40, 7, 7, 61, 3]

needs_bf16 = pytest.mark.skipif(not has_bf16_gemm(CPU), reason="this CPU has no bfloat16 products")
needs_int8 = pytest.mark.skipif(not has_int8_gemm(CPU), reason="this CPU has no fast int8 products")
needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no kernels for this CPU")

PLANS = [
    pytest.param(WeightPlan(torch.bfloat16, packed=True), marks=needs_bf16),
    pytest.param(WeightPlan(torch.float32, WeightFormat.W8A16, packed=True), marks=needs_int8),
    pytest.param(WeightPlan(torch.bfloat16, WeightFormat.W8A8, packed=True), marks=needs_int8),
    pytest.param(WeightPlan(torch.bfloat16, WeightFormat.BFP16, packed=True, native=True), marks=needs_kernels),
    pytest.param(WeightPlan(torch.float32, WeightFormat.W8A16, packed=True, native=True), marks=needs_kernels),
]


class LowRank(nn.Module):
    """What an adapter library puts in place of a linear layer: the layer, and a product of two thin ones beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        self.down = nn.Linear(linear.in_features, 4, bias=False, dtype=linear.weight.dtype)
        self.up = nn.Linear(4, linear.out_features, bias=False, dtype=linear.weight.dtype)
        for parameter in (self.down.weight, self.up.weight):
            nn.init.normal_(parameter, std=0.7, generator=torch.Generator().manual_seed(len(parameter)))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base_layer(hidden) + self.up(self.down(hidden))  # type: ignore[no-any-return]


class Negated(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return -weight


class QuantizedSubclass(nn.Linear):
    """As bitsandbytes puts it in place of a linear layer: a subclass with integer weights, ternary ones here."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.scale = linear.weight.detach().abs().mean()
        self.weight = nn.Parameter(linear.weight.detach().sign().to(torch.int8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype)) * self.scale


class QuantizedModule(nn.Module):
    """As AWQ and GPTQ put it in place of a linear layer: no ``nn.Linear``, its weights are buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().mean()
        self.register_buffer("qweight", linear.weight.detach().sign().to(torch.int8))

    def forward(self, input: Tensor) -> Tensor:
        qweight: Any = self.qweight
        return nn.functional.linear(input, qweight.to(input.dtype)) * self.scale


def hooked(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda module, inputs, output: -output)
    return linear


def parametrized(linear: nn.Linear) -> nn.Linear:
    parametrize.register_parametrization(linear, "weight", Negated())
    return linear


CHANGES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "adapter": LowRank,
    "hook": hooked,
    "parametrization": parametrized,
    "quantized subclass": QuantizedSubclass,
    "quantized module": QuantizedModule,
}


def logits(network: Any) -> Tensor:
    model: LanguageModel = TransformersModel(network)
    cache = model.new_cache(1, len(IDS))
    cache.add()
    return model.forward(torch.tensor([IDS]), TokenLayout.chain(len(IDS)), cache).logits.float()


@torch.no_grad()
@pytest.mark.parametrize("place", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_modified_linear_layer_keeps_its_effect(plan: WeightPlan, change: str, place: str) -> None:
    """Rounding moves the logits far less than the modification does; without it they would be the unmodified ones."""
    network: Any = deepcopy(tiny("llama")).to(plan.dtype)
    unmodified = logits(network)
    for layer in network.model.layers:
        name = place.split(".")[-1]
        parent = layer.get_submodule(place.split(".")[0])
        setattr(parent, name, CHANGES[change](getattr(parent, name)))
    expected = logits(network)
    pack(network, plan)
    assert any(
        type(module).__name__.endswith("Linear") and type(module) is not nn.Linear for module in network.modules()
    )
    rounding, effect = (logits(network) - expected).norm(), (unmodified - expected).norm()
    assert rounding < 0.2 * effect
