"""How much of a text a draft reads, by what reading costs and what it saves."""

import pytest

import mcsd
from mcsd.planning import Planner, Profile, StepCosts
from mcsd.planning.acceptance import geometric_rates
from mcsd.planning.stretch import MAX_REMAINING, best_stretch

GREEDY = mcsd.SamplingParams(temperature=0)
PLAIN, DRAFTED, READING = 0.036, 0.022, 0.002
"""Seconds on Qwen2.5-Coder 1.5B with the 0.5B, two Zen 4 cores."""


def test_a_draft_reads_everything_that_costs_nothing() -> None:
    assert best_stretch(4000, 64, PLAIN, DRAFTED, 0.0) == (4000, pytest.approx(64 * (PLAIN - DRAFTED)))
    assert best_stretch(0, 64, PLAIN, DRAFTED, READING) == (0, pytest.approx(64 * (PLAIN - DRAFTED)))


def test_longer_answers_are_worth_longer_stretches() -> None:
    stretches = [best_stretch(2000, remaining, PLAIN, DRAFTED, READING)[0] for remaining in (8, 64, 256)]
    assert stretches == sorted(stretches)
    assert stretches[0] <= 64 < stretches[2] < 2000
    most = best_stretch(2000, MAX_REMAINING, PLAIN, DRAFTED, READING)
    assert best_stretch(2000, 10**6, PLAIN, DRAFTED, READING) == most


def test_a_short_answer_is_not_worth_a_long_prompt() -> None:
    assert best_stretch(2000, 64, PLAIN, DRAFTED, READING)[1] > 0
    assert best_stretch(2000, 2, PLAIN, DRAFTED, READING)[1] < 0
    assert best_stretch(4, 8, PLAIN, DRAFTED, READING)[1] > 0
    assert best_stretch(4, 64, PLAIN, 1.01 * PLAIN, READING)[1] < 0


def planner(per_token: float) -> Planner:
    costs = StepCosts(((1, 1.0), (64, 1.0)), ((1, 0.1), (8, 0.1 + 7 * per_token)), 0.0, 0.0, 0.0, 0.0)
    good = geometric_rates(0.8, 0.1)
    plan = Planner(Profile(costs, good, good), "mcss-wor")
    assert len(plan.choose([GREEDY]))
    return plan


def test_a_planner_counts_reading_before_it_speculates() -> None:
    assert planner(0.0).stretches([500], [64]) == [500]
    assert planner(0.1).stretches([500], [2]) is None
    (some,) = planner(0.1).stretches([500], [64]) or [0]
    assert 0 < some < 500


def test_a_planner_weighs_the_whole_batch() -> None:
    plan = planner(0.1)
    plan.choose([GREEDY] * 2)
    assert plan.stretches([500, 500], [2, 2]) is None
    one = plan.stretches([500, 0], [2, 200])
    assert one is not None
    assert one[0] <= 64
    assert one[1] == 0


BAD = geometric_rates(0.02, 0.01)


@pytest.mark.parametrize(("per_token", "batch_size", "tokens"), [(0.0, 1, 64), (0.09, 1, 35), (0.09, 8, 16)])
def test_a_probe_reads_little(per_token: float, batch_size: int, tokens: int) -> None:
    """In a twentieth of the time of the 64 plain steps before it, a second each; from 16 to 64 tokens."""
    levels = ((1, 0.1), (64, 0.1 + 63 * per_token))
    plan = Planner(Profile(StepCosts(((1, 1.0), (64, 1.0)), levels, 0.0, 0.0, 0.0, 0.0), BAD, BAD), "mcss-wor")
    sizes = [len(plan.choose([GREEDY] * batch_size)) for _ in range(65)]
    assert [size > 0 for size in sizes] == [False] * 64 + [True]
    assert plan.stretches([500] * batch_size, [2] * batch_size) == [tokens] * batch_size


def test_there_is_no_probe_where_no_draft_could_be_fast_enough() -> None:
    """A step with candidates of eight sequences takes twice as long as a plain one."""
    costs = StepCosts(((1, 1.0), (8, 1.0), (16, 2.0), (64, 8.0)), ((1, 0.1),), 0.0, 0.0, 0.0, 0.0)
    plan = Planner(Profile(costs, BAD, BAD), "mcss-wor")
    assert not any(len(plan.choose([GREEDY] * 8)) for _ in range(400))
    assert any(len(plan.choose([GREEDY])) for _ in range(400))
