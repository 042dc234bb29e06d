"""Fused layers for CUDA cards compute what the layers of transformers compute, and share their weights."""

import copy

import pytest
import torch
from torch import Tensor

from mcsd.cuda import layers, triton_kernels
from mcsd.cuda.layers import CudaRotary, TritonAttention, TritonMLP, fuse_for_cuda, fused_copy
from mcsd.models import TokenLayout, TransformersModel
from mcsd.models.fusion import FusedAttention, FusedMLP
from mcsd.models.prefill import prefill
from mcsd.tree import TreeShape
from support.tiny import FAMILIES, VOCABULARY, tiny
from support.triton_checks import DEVICE, run_checks

FUSED = ("llama", "qwen2", "qwen3", "mistral-window")
SHAPE = TreeShape.parse("3x2x1")


def logits_of_trees(model: TransformersModel) -> list[Tensor]:
    """Logits of two forwards of trees after texts of different lengths, and of a batch of one."""
    generator = torch.Generator().manual_seed(0)
    layout = TokenLayout.tree(SHAPE, model.device)
    outputs = []
    for lengths in ([9, 1, 30], [5]):
        cache = model.new_cache(len(lengths), 64)
        for length in lengths:
            prefill(model, cache, cache.add(), torch.randint(VOCABULARY, (length,), generator=generator).tolist())
        for _ in range(2):
            tokens = torch.randint(VOCABULARY, (len(lengths), 1 + len(SHAPE)), generator=generator).to(model.device)
            outputs.append(model.forward(tokens, layout, cache).logits)
            columns = torch.tensor([[0, 2, 6]] * len(lengths), device=model.device)
            cache.commit(columns, torch.arange(1, 1 + len(lengths), device=model.device))
    return outputs


def assert_same(ours: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(ours, expected, strict=True):
        # In float32 only the order of sums differs.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_triton(family: str) -> None:
    network = tiny(family)
    expected = logits_of_trees(TransformersModel(network))
    fuse_for_cuda(network)
    kinds = {type(module) for module in network.modules()}
    assert kinds.isdisjoint({TritonAttention, TritonMLP})
    assert (family in FUSED) == ({CudaRotary, FusedAttention, FusedMLP} <= kinds)
    assert_same(logits_of_trees(TransformersModel(network)), expected)


def test_a_fused_copy_shares_its_weights() -> None:
    network = tiny("llama")
    expected = logits_of_trees(TransformersModel(network))
    kinds = [type(module) for module in network.modules()]
    copied = fused_copy(network)
    assert_same(logits_of_trees(TransformersModel(copied)), expected)
    assert [type(module) for module in network.modules()] == kinds
    assert all(map(torch.equal, logits_of_trees(TransformersModel(network)), expected))
    storages = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    assert {parameter.untyped_storage().data_ptr() for parameter in copied.parameters()} <= storages


@pytest.mark.thorough
@pytest.mark.parametrize("device", ["interpreter", "cuda"])
def test_with_triton(device: str) -> None:
    run_checks(__file__, device)


@pytest.mark.parametrize("family", FUSED)
def check_models(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees and prefills, with one of more tokens than our attention takes."""
    network = tiny(family).to(DEVICE)
    expected = logits_of_trees(TransformersModel(copy.deepcopy(network)))
    monkeypatch.setattr(triton_kernels, "is_available", lambda device: True)
    monkeypatch.setattr(layers, "MAX_TOKENS", 20)
    fuse_for_cuda(network)
    assert {TritonAttention, TritonMLP} <= {type(module) for module in network.modules()}
    assert_same(logits_of_trees(TransformersModel(network)), expected)
