"""Same text as ``model.generate`` at temperature 0 in float32, for a tiny model of every family."""

from functools import cache
from typing import Any

import pytest
import torch

import mcsd
from support.ngrams import eager_ngram
from support.parity import TREES, compare, reference
from support.tiny import VOCABULARY, tiny


@cache
def tiny_pair(family: str) -> tuple[Any, Any, list[list[int]]]:
    """Target, draft and prompts."""
    network, draft = tiny(family), tiny(family, seed=1)
    # A draft that is the target with a little noise: it agrees often, not always.
    for parameter, own in zip(draft.parameters(), network.parameters(), strict=True):
        parameter.data = own.data + 0.15 * own.data.std() * torch.randn_like(own) if own.dim() > 1 else own.data
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in (4, 17, 1, 30, 12, 5, 8, 21, 2, 9)]
    return network, draft, ids


@cache
def expected(family: str, number: int, new: int) -> list[int]:
    """What ``model.generate`` says to a prompt."""
    network, _, ids = tiny_pair(family)
    return reference(network, ids[number], new)


# Fewer texts must be longer: a family that hardly repeats itself lets few drafts from its own text through.
@pytest.mark.parametrize(
    ("batch", "count", "new"), [(1, 3, 64), (8, 10, 32), pytest.param(8, 10, 64, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_tiny_families(family: str, tree: str | list[int], batch: int, count: int, new: int) -> None:
    network, draft, ids = tiny_pair(family)
    wanted = [expected(family, number, new) for number in range(count)]
    params = mcsd.SamplingParams(temperature=0, max_new_tokens=new)
    for proposer in (draft, eager_ngram()):
        engine = mcsd.Engine(network, proposer, tree=tree, max_batch=batch, max_length=200)
        done = engine.generate(ids[:count], params)
        assert compare(network, wanted, ids[:count], done) <= 1
        if tree != "none":
            assert sum(completion.stats.accepted_tokens for completion in done) > 0
