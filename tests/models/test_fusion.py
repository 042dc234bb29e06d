"""Fused and compiled layers: they compute what the layers of transformers do, for trees, batches and their caches."""

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import mcsd
from conftest import FAMILIES, tiny
from mcsd import errors
from mcsd.models import Block, TransformersModel
from mcsd.models.compilation import compile_layers
from mcsd.models.fusion import Attention, FeedForward, Norm, Rotary, fuse

KNOWN = ["llama", "mistral-window", "qwen2", "qwen3"]
TREE = mcsd.TreeShape.parse("3x2x1")
BELOW = Block(torch.tensor([0, 1, 2, 2]), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1]]).bool())
"""Two siblings below two tokens that are in flight already."""


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """But for norms, which transformers rounds to float32 in double precision too."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def exact(family: str) -> Any:
    """In double precision, in which another order of sums does not matter."""
    return tiny(family).double()


def outputs(network: Any) -> list[Tensor]:
    """Logits and states of two texts of different lengths, of trees behind them, of one token, of a draft's levels."""
    model = TransformersModel(network)
    cache = model.new_cache(2, 40)
    for _ in range(2):
        cache.add()
    generator = torch.Generator().manual_seed(3)
    found = []
    blocks = [
        (Block.chain(11), [11, 4]),
        (Block.tree(TREE), [3, 2]),
        (Block.chain(1), [1, 1]),
        (Block.chain(2), [0, 0]),
        (BELOW, [3, 1]),
        (Block.chain(2), [2, 1]),
    ]
    for block, kept in blocks:
        tokens = torch.randint(0, 96, (2, len(block.mask)), generator=generator)
        output = model.forward(tokens, block, cache, hidden=(0, 1, -1))
        assert output.hidden is not None
        found += [output.logits, output.hidden]
        if any(kept):
            cache.commit(torch.arange(max(kept)).expand(2, -1), torch.tensor(kept))
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fused_layers_compute_the_same(family: str) -> None:
    network = exact(family)
    fused = deepcopy(network)
    fuse(fused)
    kinds = {type(module) for module in fused.modules()}
    assert ({Attention, FeedForward, Norm, Rotary} <= kinds) == (family in KNOWN)
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


def test_angles_that_move_with_the_length_are_left_alone() -> None:
    network = tiny("llama")
    network.model.rotary_emb.rope_type = "dynamic"
    fuse(network)
    assert not any(isinstance(module, Attention | Rotary) for module in network.modules())


def test_angles_are_known_however_long_a_text_grows() -> None:
    network = tiny("llama").double()
    rotary = Rotary(network.model.rotary_emb)
    states = torch.zeros(1, dtype=torch.float64)
    for place in (3, 5000, 7):
        cos, sin = network.model.rotary_emb(states, torch.tensor([[place]]))
        ours = rotary(states, torch.tensor([[place]]))
        assert torch.equal(ours[0][0, :, 0], cos[0])
        assert torch.equal(ours[1][0, :, 0].abs(), sin[0].abs())


@pytest.mark.parametrize(
    # The one has biases, the other norms of heads; the rest is in both.
    "family",
    ["qwen2", "qwen3", *(pytest.param(family, marks=pytest.mark.slow) for family in ("llama", "mistral-window"))],
)
def test_compiled_layers_compute_the_same(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    graphs = counters["stats"]["unique_graphs"]
    network = exact(family)
    compiled = deepcopy(network)
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.McsdWarning)
        compile_layers(TransformersModel(compiled))
    # Two functions, for one token and for several.
    assert counters["stats"]["unique_graphs"] - graphs == 4
    # Whatever the number of rows and tokens, what was compiled at first is in use.
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = outputs(compiled)
    for ours, theirs in zip(found, outputs(network), strict=True):
        assert_same(ours, theirs)


def test_what_cannot_be_compiled_runs_as_it_is_and_says_why() -> None:
    network = exact("gpt2")
    before = outputs(network)
    with pytest.warns(errors.McsdWarning, match="no known kind"):
        compile_layers(TransformersModel(network))
    assert all(torch.equal(a, b) for a, b in zip(outputs(network), before, strict=True))


def test_without_a_compiler_it_says_so_and_runs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    network = exact("llama")
    before = outputs(network)
    nothing = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with nothing, pytest.warns(errors.McsdWarning, match="No working C\\+\\+ compiler"):
        compile_layers(TransformersModel(network))
    for ours, theirs in zip(outputs(network), before, strict=True):
        assert_same(ours, theirs)
