"""Models that compute something else for a tree than for its paths are refused, whatever their class is."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import mcsd
from mcsd import errors
from mcsd.models import TransformersModel, self_check
from mcsd.models.compatibility import as_model
from support.families import scaled
from support.tiny import tiny

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def causal(columns: int, new: int, window: int, like: Tensor) -> Tensor:
    """An additive mask ``[B, 1, new, columns]`` in the order of the slots."""
    query, key = torch.arange(columns - new, columns)[:, None], torch.arange(columns)
    allowed = (key <= query) & (key > query - window)
    return torch.where(allowed, 0.0, torch.finfo(like.dtype).min).to(like.dtype).expand(len(like), 1, -1, -1)


class IgnoresMask(LlamaForCausalLM):  # type: ignore[misc]
    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, cache: Any = None, **rest: Any
    ) -> Any:
        if attention_mask is not None:
            attention_mask = causal(attention_mask.shape[-1], attention_mask.shape[-2], 1 << 20, attention_mask)
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache, **rest)


class IgnoresPositions(LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, input_ids: Tensor, position_ids: Any = None, cache: Any = None, **rest: Any) -> Any:
        start = 0 if cache is None else cache.get_seq_length()
        slots = torch.arange(start, start + input_ids.shape[1])[None]
        return super().forward(input_ids, position_ids=slots, cache=cache, **rest)


class SeesLaterTokens(LlamaForCausalLM):  # type: ignore[misc]
    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, cache: Any = None, **rest: Any
    ) -> Any:
        if attention_mask is None:
            attention_mask = torch.zeros(len(input_ids), 1, *2 * input_ids.shape[1:], dtype=self.dtype)
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache, **rest)


class KeepsNoCache(LlamaForCausalLM):  # type: ignore[misc]
    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, cache: Any = None, **rest: Any
    ) -> Any:
        if attention_mask is not None:
            attention_mask = attention_mask[..., -input_ids.shape[1] :]
        return super().forward(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, **rest | {"use_cache": False}
        )


class DependsOnNeighbours(LlamaForCausalLM):  # type: ignore[misc]
    """As rotary embeddings that are chosen by the longest position of a forward, whatever they are called."""

    def forward(self, input_ids: Tensor, position_ids: Any = None, cache: Any = None, **rest: Any) -> Any:
        positions = position_ids * (2 if position_ids.max() > 100 else 1)
        return super().forward(input_ids, position_ids=positions, cache=cache, **rest)


class Fails(LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, input_ids: Tensor, position_ids: Any = None, cache: Any = None, **rest: Any) -> Any:
        if cache is not None:
            raise AttributeError("no update_indexer")
        return super().forward(input_ids, position_ids=position_ids, cache=cache, **rest)


class WindowOffByOne(MistralForCausalLM):  # type: ignore[misc]
    """Sees one position more than `sliding_window` says."""

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, cache: Any = None, **rest: Any
    ) -> Any:
        if attention_mask is None:
            like = torch.empty(len(input_ids), dtype=self.dtype)
            attention_mask = causal(*2 * input_ids.shape[1:], self.config.sliding_window + 1, like)
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache, **rest)


FAULTS = {
    IgnoresMask: "ignores the mask of a tree",
    IgnoresPositions: "derives positions from cache slots",
    SeesLaterTokens: "its attention is not causal",
    KeepsNoCache: "does not use a key-value cache",
    DependsOnNeighbours: "than its paths|derives positions",
    Fails: "cannot read a tree: AttributeError: .*update_indexer",
    WindowOffByOne: "sliding window that is not what its configuration says",
}


def model_of(cls: type, **options: Any) -> Any:
    config = MistralConfig if issubclass(cls, MistralForCausalLM) else LlamaConfig
    torch.manual_seed(0)
    return scaled(cls(config(**SIZES | options)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", FAULTS, ids=lambda cls: cls.__name__)
def test_a_model_that_cannot_read_trees_is_refused(cls: type, dtype: torch.dtype) -> None:
    network = model_of(cls).to(dtype)
    for role in ({"target": network, "draft": "ngram"}, {"target": tiny("llama"), "draft": network}):
        with pytest.raises(errors.UnsupportedModel, match=f"^{cls.__name__} .*{FAULTS[cls]}") as info:
            mcsd.Engine(**role, tree="2x2")
        assert "\n" not in str(info.value)


@pytest.mark.parametrize("window", [2, 5, 64, 4096])
def test_a_window_of_any_length_is_checked(window: int) -> None:
    as_model(model_of(MistralForCausalLM, sliding_window=window))
    with pytest.raises(errors.UnsupportedModel, match="sliding window"):
        as_model(model_of(WindowOffByOne, sliding_window=window))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.02, 0.25, 1.0])
def test_right_models_pass_in_every_dtype(family: str, dtype: torch.dtype, scale: float) -> None:
    network: Any = tiny(family)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, scale)
    as_model(network.to(dtype))


def test_a_fault_that_does_not_change_the_logits_is_not_seen() -> None:
    network = model_of(IgnoresMask)
    for layer in network.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    as_model(network)


def test_bidirectional_attention_is_refused_by_its_configuration_and_by_the_check() -> None:
    network: Any = scaled(tiny_gemma(use_bidirectional_attention=True))
    with pytest.raises(errors.UnsupportedModel, match="its attention is not causal"):
        mcsd.Engine(network, "ngram")
    network = scaled(tiny_gemma(use_bidirectional_attention=True))
    model = TransformersModel(scaled(tiny_gemma()))
    model.network = model.given = network
    with pytest.raises(errors.UnsupportedModel, match="its attention is not causal"):
        self_check.check_tree_attention(model)


def tiny_gemma(**options: Any) -> Any:
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=7, **options))


def test_a_model_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    check = self_check._check
    monkeypatch.setattr(self_check, "_passed", set())
    monkeypatch.setattr(self_check, "_check", lambda model: checked.append(model) or check(model))
    as_model(model_of(LlamaForCausalLM))
    as_model(model_of(LlamaForCausalLM))
    assert len(checked) == 1
    as_model(model_of(LlamaForCausalLM).bfloat16())
    as_model(model_of(LlamaForCausalLM, rope_theta=100.0))
    assert len(checked) == 3


def test_a_hooked_model_is_checked_each_time() -> None:
    as_model(model_of(LlamaForCausalLM))
    network = model_of(LlamaForCausalLM)
    network.model.layers[0].register_forward_hook(lambda module, args, output: output + args[0].flip(1))
    with pytest.raises(errors.UnsupportedModel, match="not causal"):
        as_model(network)


def test_the_model_is_not_changed() -> None:
    network: Any = model_of(MistralForCausalLM, sliding_window=64)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    as_model(network)
    assert network.config.sliding_window == 64
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
