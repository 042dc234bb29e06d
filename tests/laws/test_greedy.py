"""At temperature 0 every scheme generates the greedy text, with equal acceptance in greedy and in mixed batches."""

import pytest
import torch

import mcsd
from support.chisquare import engine_of, runnable, table

NEW = 7
GREEDY, SAMPLED = mcsd.SamplingParams(temperature=0, max_new_tokens=NEW), mcsd.SamplingParams(max_new_tokens=NEW)


@pytest.mark.parametrize(("scheme", "tree"), runnable("chain:3", "3x2", "2x2x1"))
def test_the_greedy_text_in_any_batch(scheme: str, tree: str) -> None:
    target, draft = table(7, seed=4), table(7, seed=11, sharpness=0.5)
    engine = engine_of(target, draft, tree, scheme)
    starts = list(range(7))
    greedy = engine.generate([[start] for start in starts], GREEDY)
    mixed = engine.generate([[start] for start in starts for _ in range(2)], [GREEDY, SAMPLED] * 7)[::2]
    accepted = 0
    for start, alone, beside in zip(starts, greedy, mixed, strict=True):
        text = [start]
        for _ in range(NEW):
            text.append(int(torch.argmax(target[text[-1]])))
        assert list(alone.token_ids) == list(beside.token_ids) == text[1:]
        assert alone.stats.accepted_tokens == beside.stats.accepted_tokens
        accepted += alone.stats.accepted_tokens
    assert 0 < accepted < 7 * NEW
