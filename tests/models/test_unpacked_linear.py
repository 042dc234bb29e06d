"""A user's model in bfloat16 runs in our kernel for few tokens, and stays as it is."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mcsd import kernels
from mcsd.models import TransformersModel
from mcsd.models.layout import TokenLayout
from mcsd.models.unpacked_linear import UnpackedLinears
from support.families import tiny_family

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no kernels for this CPU")

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def logits_of(model: TransformersModel) -> Tensor:
    """The logits of `IDS`, in one forward as the engine does it."""
    cache = model.new_cache(1, 16)
    cache.add()
    return model.forward(IDS, TokenLayout.chain(IDS.shape[1]), cache).logits


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Outputs of each product that the kernel does."""
    seen, run = [], kernels.bf16_linear

    def counted(activations: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(len(weight))
        return run(activations, weight, bias)

    monkeypatch.setattr(kernels, "bf16_linear", counted)
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt-neox", "mixtral"])
@torch.no_grad()
def test_logits_are_as_exact_as_those_of_the_model_itself(family: str, calls: list[int]) -> None:
    network: Any = tiny_family(family).bfloat16()
    exact = copy.deepcopy(network).float()(input_ids=IDS).logits
    own = network(input_ids=IDS).logits
    assert not calls, "the kernel runs in the engine only"
    found = logits_of(TransformersModel(network))
    assert calls[-1] == network.config.vocab_size, "the output matrix is a linear layer"
    errors = [(each - exact).square().mean().sqrt() for each in (found, own)]
    assert errors[0] < 1.25 * errors[1]
    assert torch.equal(network(input_ids=IDS).logits, own)


def test_weights_that_change_are_read_anew() -> None:
    network: Any = tiny_family("llama").bfloat16()
    model = TransformersModel(network)
    before = logits_of(model)
    with torch.no_grad():
        network.lm_head.weight.mul_(2)
    assert torch.equal(logits_of(model), 2 * before)
    network.lm_head.weight = nn.Parameter(network.lm_head.weight.detach() * 2)
    assert torch.equal(logits_of(model), 4 * before)


def test_products_with_gradients_are_left_to_pytorch(calls: list[int]) -> None:
    layer = nn.Linear(8, 4, dtype=torch.bfloat16)
    with UnpackedLinears():
        layer(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is not None
    assert not calls
