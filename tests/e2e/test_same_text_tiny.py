"""Same text as ``model.generate`` at temperature 0 in float32, for a tiny model of every family."""

from functools import cache
from typing import Any

import pytest
import torch
from parity import TREES, compare, reference

import mcsd
from conftest import VOCABULARY, tiny


@cache
def tiny_pair(family: str) -> tuple[Any, Any, list[list[int]], list[list[int]]]:
    """Target, draft, prompts, and what ``model.generate`` says to them."""
    network, draft = tiny(family), tiny(family, seed=1)
    # A draft that is the target with a little noise: it agrees often, not always.
    for parameter, own in zip(draft.parameters(), network.parameters(), strict=True):
        parameter.data = own.data + 0.15 * own.data.std() * torch.randn_like(own) if own.dim() > 1 else own.data
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in (4, 17, 1, 30, 12, 5, 8, 21, 2, 9)]
    return network, draft, ids, [reference(network, prompt, 64) for prompt in ids]


@pytest.mark.parametrize(("batch", "count"), [(1, 3), (8, 10)])
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_tiny_families(family: str, tree: str | list[int], batch: int, count: int) -> None:
    network, draft, ids, expected = tiny_pair(family)
    params = mcsd.SamplingParams(temperature=0, max_new_tokens=64)
    for proposer in (draft, "ngram"):
        engine = mcsd.Engine(network, proposer, tree=tree, max_batch=batch, max_length=200)
        done = engine.generate(ids[:count], params)
        assert compare(network, expected[:count], ids[:count], done) <= 1
        if tree != "none":
            assert sum(completion.stats.accepted_tokens for completion in done) > 0
