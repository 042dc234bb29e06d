"""Models on other devices than a CPU, without such a device: ``meta`` stands for one, or a card's answers are given."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import mcsd
from mcsd import errors
from mcsd.models import BoundHead, Cache, DraftHead, LanguageModel, ModelOutput, TokenLayout, TransformersModel
from mcsd.models.draft_head import HeadConfig
from mcsd.models.kv_cache import KVCache
from mcsd.models.prefill import prefill
from mcsd.models.transformers import attention_backends
from mcsd.testing import TabularModel
from support.tiny import VOCABULARY, tiny

CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 0)
GREEDY = mcsd.SamplingParams(temperature=0, max_new_tokens=12)


def as_network(network: nn.Module) -> Any:
    return network


def as_model(network: nn.Module) -> Any:
    return TransformersModel(network)


@pytest.mark.parametrize("wrap", [as_network, as_model])
def test_a_draft_on_another_device_is_refused(wrap: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(errors.UnsupportedModel, match=r"draft \S+ is on meta, target \S+ on cpu") as info:
        mcsd.Engine(tiny("llama"), wrap(tiny("llama", 1).to("meta")), tree="2x1")  # type: ignore[arg-type]
    assert info.value.hint


@pytest.mark.parametrize("wrap", [as_network, as_model])
def test_a_model_without_weights_is_refused(wrap: Callable[[nn.Module], Any]) -> None:
    network: Any = tiny("llama").to("meta")  # type: ignore[arg-type]
    for models in ((wrap(network), tiny("llama", 1)), (wrap(network), "ngram")):
        with pytest.raises(errors.UnsupportedModel, match="is on meta: its weights are not loaded"):
            mcsd.Engine(*models, tree="2x1")


def test_a_head_bound_to_a_target_on_another_device_is_refused() -> None:
    head = DraftHead(HeadConfig("tiny", VOCABULARY, 32, (-1,), 1, VOCABULARY))
    bound = BoundHead(head, TransformersModel(tiny("llama").to("meta")), "head")  # type: ignore[arg-type]
    with pytest.raises(errors.UnsupportedModel, match=r"draft head is on meta, target .* on cpu"):
        mcsd.Engine(tiny("llama"), bound, tree="2x1")


@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize("part", ["model.embed_tokens", "model.layers.1.mlp.down_proj"])
def test_a_model_with_offloaded_weights_is_refused(role: str, part: str) -> None:
    offloaded: Any = tiny("llama")
    offloaded.get_submodule(part).to("meta")
    models = {"target": tiny("llama", 1), "draft": tiny("llama", 2)} | {role: offloaded}
    with pytest.raises(errors.UnsupportedModel, match="LlamaForCausalLM has weights that are offloaded") as info:
        mcsd.Engine(**models, tree="2x1")
    assert "device_map" in info.value.hint


class ParameterOnCuda(nn.Parameter):
    """A parameter in CPU memory that says it is on CUDA."""

    device = property(lambda self: CUDA)  # type: ignore[assignment]


@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_model_spread_over_devices_is_refused(role: str) -> None:
    spread: Any = tiny("llama")
    spread.model.norm.weight.__class__ = ParameterOnCuda
    models = {"target": tiny("llama", 1), "draft": tiny("llama", 2)} | {role: spread}
    with pytest.raises(errors.UnsupportedModel, match="LlamaForCausalLM is spread over the devices cpu, cuda") as info:
        mcsd.Engine(**models, tree="2x1")
    assert "device_map" in info.value.hint


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_may_have_another_dtype_than_the_target(temperature: float) -> None:
    draft: Any = tiny("llama", 1).to(torch.bfloat16)
    params = mcsd.SamplingParams(temperature=temperature, max_new_tokens=12, seed=1)
    done = mcsd.Engine(tiny("llama"), draft, tree="2x1").generate([[5, 6]], params)[0]
    assert len(done.token_ids) == 12
    if temperature == 0:
        plain = mcsd.Engine(tiny("llama"), "ngram", tree="none").generate([[5, 6]], params)[0]
        assert done.token_ids == plain.token_ids


class OnMeta(Tensor):
    """A tensor in CPU memory that says it is on another device."""

    device = property(lambda self: META)  # type: ignore[assignment]


def test_a_table_is_on_the_device_of_its_tensor() -> None:
    model = TabularModel(torch.full((4, 4), 0.25).as_subclass(OnMeta))
    assert model.device == META
    assert model.new_cache(2, 8).lengths.device == META
    assert TabularModel(torch.full((4, 4), 0.25)).device == CPU


class SaysCuda(LlamaForCausalLM):  # type: ignore[misc]
    """A network in CPU memory that says it is on CUDA."""

    device = CUDA


@pytest.mark.parametrize(("cls", "cudnn"), [(SaysCuda, False), (LlamaForCausalLM, True)])
def test_attention_on_cuda_never_goes_to_cudnn(cls: type, cudnn: bool) -> None:
    network: Any = tiny("llama")
    network.__class__ = cls
    seen: list[bool] = []
    network.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    model = TransformersModel(network)
    cache = KVCache(2, 1, 16, CPU)
    cache.add()
    model.forward(torch.tensor([[1, 2, 3]]), TokenLayout.chain(3), cache)
    assert seen == [cudnn]
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_other_back_ends_of_attention_stay() -> None:
    with attention_backends(CUDA)():
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()


class Counting:
    """A language model that records how many tokens each forward reads."""

    vocab_size, max_length, eos_token_ids, name = 4, None, frozenset[int](), "counting"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.read: list[int] = []

    def new_cache(self, max_batch: int, max_tokens: int) -> Cache:
        return Cache(max_batch, self.device)

    def forward(
        self,
        tokens: Tensor,
        layout: TokenLayout,
        cache: Cache,
        sequences: slice = slice(None),
        logits: bool = True,
        hidden_layers: Sequence[int] = (),
    ) -> ModelOutput:
        self.read.append(tokens.shape[1])
        return ModelOutput(tokens.float(), None)


@pytest.mark.parametrize(("device", "read"), [(CPU, [256, 256, 88]), (META, [600])])
def test_a_prefill_reads_more_tokens_at_a_time_on_a_gpu(device: torch.device, read: list[int]) -> None:
    model: Any = Counting(device)
    assert isinstance(model, LanguageModel)
    cache = model.new_cache(1, 600)
    prefill(model, cache, cache.add(), [1] * 600)
    assert model.read == read


@pytest.mark.parametrize(("device", "slots"), [(CPU, 2048), (META, 256)])
def test_a_cache_on_a_gpu_starts_small_and_grows(device: torch.device, slots: int) -> None:
    cache = KVCache(1, 2, 3000, device)
    keys = torch.zeros(1, 2, 3, 4, device=device)
    stores: list[Any] = [cache.store(keys, keys), cache.other_store(0, 1, keys[..., :3])]
    assert [store.shape for store in stores] == [(1, 2, 2, 2, slots, 4), (1, 1, 2, 2, slots, 3)]
    cache._grow(slots + 1)
    stores = [cache.store(keys, keys), cache.other_store(0, 1, keys[..., :3])]
    assert [store.shape[4] for store in stores] == [min(2 * slots, 3000)] * 2
    assert cache.bytes_per_token == 4 * (2 * 4 + 2 * 3)


def test_a_cache_that_a_gpu_has_no_memory_for_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking it would fail otherwise here: there is no such device."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * 10**8)
    keys: Any = torch.zeros(1, 8, 1, 128, dtype=torch.bfloat16).as_subclass(OnCuda)
    cache = KVCache(32, 256, 4096, META)
    with pytest.raises(errors.OutOfMemory, match=r"needs 8\.6 GB on cuda:0, where 3\.5 GB are free") as info:
        cache.store(keys, keys)
    assert "max_batch" in info.value.hint


class OnCuda(Tensor):
    """A tensor in CPU memory that says it is on CUDA."""

    device = property(lambda self: CUDA)  # type: ignore[assignment]
