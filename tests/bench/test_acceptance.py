"""Acceptance against k agrees with theory, and with trees of k candidates.

Odds. Seeds are fixed. Shares of n trials are off by more than four standard deviations once in 15,000.
"""

from itertools import pairwise
from math import sqrt

import pytest
import torch

import mcsd
from mcsd.bench.acceptance import COMPARED_SCHEMES, MAX_CANDIDATES, count_accepted, score_answer
from support.tables import tables

TRIALS = 4096


def engine(tree: str) -> mcsd.Engine:
    target, draft = tables()
    return mcsd.Engine(target, draft, tree=tree, max_batch=TRIALS, max_length=16)


def within(scheme: str, temperature: float = 1.0) -> list[float]:
    subject = engine(str(MAX_CANDIDATES))
    answer = score_answer(subject, [3], [5])
    params = mcsd.SamplingParams(temperature=temperature)
    return [count / TRIALS for count in count_accepted(subject, answer, params, scheme, TRIALS)]


def near(share: float, expected: float) -> bool:
    return abs(share - expected) < 4 * sqrt(expected * (1 - expected) / TRIALS)


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    target, draft = tables()
    return target._logits[3].exp(), draft._logits[3].exp()


def test_with_replacement_every_k_agrees_with_theory() -> None:
    p, q = distributions()
    rejected = 1.0
    for share in within("mcss"):
        accepted = float(torch.minimum(p, q).sum())
        rejected *= 1 - accepted
        assert near(share, 1 - rejected)
        p = (p - q).clamp(min=0) / (p - q).clamp(min=0).sum()


@pytest.mark.parametrize("scheme", COMPARED_SCHEMES)
@pytest.mark.parametrize("k", [1, 3])
def test_the_first_k_are_accepted_as_often_as_a_tree_of_k(scheme: str, k: int) -> None:
    target, draft = tables()
    subject = mcsd.Engine(target, draft, tree=str(k), scheme=scheme, max_batch=TRIALS, max_length=16)
    params = [mcsd.SamplingParams(max_new_tokens=2, seed=10_000 + i) for i in range(TRIALS)]
    done = subject.generate([[3]] * TRIALS, params)
    in_engine = sum(len(one.stats.acceptance_histogram) > 1 and one.stats.target_calls == 1 for one in done) / TRIALS
    assert abs(within(scheme)[k - 1] - in_engine) < 4 * sqrt(2 * 0.25 / TRIALS)


def test_without_replacement_is_above_and_naive_below() -> None:
    without, replaced, naive = (within(scheme) for scheme in COMPARED_SCHEMES)
    assert all(a <= b for a, b in pairwise(without))
    assert all(a > b + 0.02 for a, b in zip(without[3:], replaced[3:], strict=True))
    assert all(a > b + 0.1 for a, b in zip(without[:4], naive[:4], strict=True))


def test_at_temperature_0_the_rank_of_the_targets_argmax_decides() -> None:
    subject = engine(str(MAX_CANDIDATES))
    greedy, ranks = mcsd.SamplingParams(temperature=0.0), []
    for last, (p, q) in enumerate(zip(*(model._logits for model in tables()), strict=True)):
        ranks.append(int((q > q[p.argmax()]).sum()))
        counts = count_accepted(subject, score_answer(subject, [last], [5]), greedy, "mcss-wor", 1)
        assert counts == [int(ranks[-1] < k) for k in range(1, 1 + MAX_CANDIDATES)]
    assert len(set(ranks)) > 4


def test_prompt_lookup_is_verified_by_top_k() -> None:
    target, _ = tables()
    subject = mcsd.Engine(target, "ngram", tree=str(MAX_CANDIDATES), max_batch=2, max_length=16)
    answer = score_answer(subject, [3, 5, 7, 3], [5, 7])
    assert answer.logits.shape == (2, target.vocab_size)
    counts = count_accepted(subject, answer, mcsd.SamplingParams(temperature=0.0), "mcss-wor", 1)
    # Look-up proposes the token that followed 3 before; the target takes its argmax.
    argmax = [int(target._logits[token].argmax()) for token in (3, 5)]
    assert counts[0] == [argmax[0] == 5, argmax[1] == 7].count(True)


def test_an_engine_is_idle_afterwards() -> None:
    subject = engine(str(MAX_CANDIDATES))
    before = subject.generate([[3]], mcsd.SamplingParams(seed=1, max_new_tokens=8))
    count_accepted(subject, score_answer(subject, [3], [5, 6]), mcsd.SamplingParams(), "mcss", 8)
    assert subject.generate([[3]], mcsd.SamplingParams(seed=1, max_new_tokens=8))[0].text == before[0].text
    assert subject.generate([[3]], mcsd.SamplingParams(seed=1, max_new_tokens=8))[0].token_ids == before[0].token_ids
