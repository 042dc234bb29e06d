"""At temperature 0 there is one text; every scheme finds it, and as fast in a greedy batch as in a mixed one."""

import pytest
import torch
from chisquare import engine_of, runnable, table

import mcsd

NEW = 7
COLD, WARM = mcsd.SamplingParams(temperature=0, max_new_tokens=NEW), mcsd.SamplingParams(max_new_tokens=NEW)


@pytest.mark.parametrize(("scheme", "tree"), runnable("chain:3", "3x2", "2x2x1"))
def test_the_likeliest_text_whoever_else_is_in_the_batch(scheme: str, tree: str) -> None:
    target, draft = table(7, seed=4), table(7, seed=11, sharpness=0.5)
    engine = engine_of(target, draft, tree, scheme)
    starts = list(range(7))
    greedy = engine.generate([[start] for start in starts], COLD)
    mixed = engine.generate([[start] for start in starts for _ in range(2)], [COLD, WARM] * 7)[::2]
    accepted = 0
    for start, alone, beside in zip(starts, greedy, mixed, strict=True):
        text = [start]
        for _ in range(NEW):
            text.append(int(torch.argmax(target[text[-1]])))
        assert list(alone.token_ids) == list(beside.token_ids) == text[1:]
        assert alone.stats.accepted_tokens == beside.stats.accepted_tokens
        accepted += alone.stats.accepted_tokens
    assert 0 < accepted < 7 * NEW
