"""Fused modules compute what the layers of transformers do; modified modules are not fused."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import DynamicCache

from mcsd.models.fusion import FusedAttention, FusedMLP, FusedRMSNorm, FusedRotary, fuse
from support.decoders import KNOWN, outputs
from support.tiny import FAMILIES, tiny


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Up to the norms, which transformers computes in float32 even for float64."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def exact(family: str) -> Any:
    """In float64, where the order of sums does not matter."""
    return tiny(family).double()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fused_layers_compute_the_same(family: str) -> None:
    network = exact(family)
    fused = deepcopy(network)
    fuse(fused)
    kinds = {type(module) for module in fused.modules()}
    assert ({FusedAttention, FusedMLP, FusedRMSNorm, FusedRotary} <= kinds) == (family in KNOWN)
    for ours, theirs in zip(outputs(fused), outputs(network), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("family", KNOWN)
def test_transformers_runs_fused_layers_too(family: str) -> None:
    """With and without a cache, with and without padding, as `mcsd verify` does."""
    network = exact(family)
    fused = deepcopy(network)
    fuse(fused)
    tokens = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    whole = torch.ones_like(tokens)
    padded = whole.clone()
    padded[0, 9:] = 0
    for mask in (whole, padded):
        for cached in (False, True):
            ours, theirs = (
                model(tokens, attention_mask=mask, use_cache=cached).logits[mask.bool()] for model in (fused, network)
            )
            assert_same(ours, theirs)
    greedy = [
        model.generate(tokens, attention_mask=whole, max_new_tokens=8, do_sample=False) for model in (fused, network)
    ]
    assert torch.equal(*greedy)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_has_the_name_of_any_version_of_transformers(name: str) -> None:
    network = exact("llama")
    fuse(network)
    hidden = torch.ones(1, 3, 32, dtype=torch.float64)
    angles = network.model.rotary_emb(hidden, position_ids=torch.arange(3)[None])
    cache = DynamicCache()
    network.model.layers[0].self_attn(
        hidden_states=hidden, position_embeddings=angles, attention_mask=None, **{name: cache}
    )
    assert cache.get_seq_length() == 3


def test_length_dependent_rope_is_not_fused() -> None:
    network = tiny("llama")
    network.model.rotary_emb.rope_type = "dynamic"
    fuse(network)
    assert not any(isinstance(module, FusedAttention | FusedRotary) for module in network.modules())


def test_the_table_of_angles_grows_with_the_text() -> None:
    network = tiny("llama").double()
    rotary = FusedRotary(network.model.rotary_emb)
    states = torch.zeros(1, dtype=torch.float64)
    for place in (3, 5000, 7):
        cos, sin = network.model.rotary_emb(states, torch.tensor([[place]]))
        ours = rotary(states, torch.tensor([[place]]))
        assert torch.equal(ours[0][0, :, 0], cos[0])
        assert torch.equal(ours[1][0, :, 0].abs(), sin[0].abs())


def scaled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


class Doubled(nn.Linear):
    """What an adapter or a quantized layer is to us: a subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def replace_forward(module: Any) -> None:
    original = module.forward
    module.forward = lambda hidden: 3 * original(hidden)


def subclass(module: Any) -> None:
    module.__class__ = Doubled


CHANGES: dict[str, Callable[[Any], Any]] = {
    "hook": lambda linear: linear.register_forward_hook(scaled),
    "pre-hook": lambda linear: linear.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
    "parametrization": lambda linear: parametrize.register_parametrization(linear, "weight", Halved()),
    "replaced forward": replace_forward,
    "subclass": subclass,
}


@pytest.mark.parametrize("place", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_modified_linear_layer_keeps_its_modification(change: str, place: str) -> None:
    network = exact("llama")
    before = outputs(deepcopy(network))
    CHANGES[change](network.model.layers[1].get_submodule(place))
    expected = outputs(network)
    assert not torch.allclose(expected[0], before[0], atol=1e-3)
    fuse(network)
    for ours, theirs in zip(outputs(network), expected, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("place", ["self_attn", "mlp", "input_layernorm"])
def test_a_modified_module_is_not_fused(place: str) -> None:
    network = exact("qwen3")
    module = network.model.layers[0].get_submodule(place)
    module.register_forward_pre_hook(lambda module, inputs, keywords: None, with_kwargs=True)
    fuse(network)
    assert network.model.layers[0].get_submodule(place) is module
