"""Who runs in the races."""

import pytest

import mcsd
from mcsd.planning import Costs, Planner, Profile
from mcsd.planning.acceptance import falling
from mcsd.schemes import SCHEMES
from mcsd.tune.contenders import entrants

COSTS = Costs(((1, 1.0), (4, 1.0), (64, 10.0)), ((1, 0.1), (8, 0.15)), 0.05, 0.01, 0.02, 0.001)


@pytest.mark.parametrize("scheme", sorted(mcsd.SCHEMES))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_entrants_can_be_judged(scheme: str, temperature: float) -> None:
    field = entrants(Profile(COSTS, falling(0.7, 0.1), falling(0.5, 0.1)), scheme, temperature, draws=True)
    names = [one.name for one in field]
    assert names[0] == "none"
    assert len(set(names)) == len(names) >= 2
    for one in field:
        SCHEMES[one.scheme].check(one.choice.shape)
    if temperature == 0:
        assert {one.scheme for one in field} == {scheme}


def test_the_best_entrant_is_what_auto_begins_with() -> None:
    profile = Profile(COSTS, falling(0.7, 0.1), falling(0.5, 0.1))
    field = entrants(profile, "mcss-wor", 1.0, draws=True)
    best = max((one for one in field if one.scheme == "mcss-wor"), key=lambda one: one.choice.rate)
    plan = Planner(profile, SCHEMES["mcss-wor"])
    assert plan.choose([mcsd.SamplingParams(seed=1)]) == best.choice.shape
