"""The configurations of a comparison."""

import pytest

import mcsd
from mcsd.planning import Planner, Profile, StepCosts
from mcsd.planning.acceptance import geometric_rates
from mcsd.schemes.registry import check_tree
from mcsd.tune.configurations import configurations

COSTS = StepCosts(((1, 1.0), (4, 1.0), (64, 10.0)), ((1, 0.1), (8, 0.15)), 0.05, 0.01, 0.02, 0.001)


@pytest.mark.parametrize("scheme", sorted(mcsd.SCHEMES))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_schemes_support_their_trees(scheme: str, temperature: float) -> None:
    field = configurations(
        Profile(COSTS, geometric_rates(0.7, 0.1), geometric_rates(0.5, 0.1)), scheme, temperature, is_sampled=True
    )
    names = [one.name for one in field]
    assert names[0] == "none"
    assert len(set(names)) == len(names) >= 2
    for one in field:
        check_tree(one.scheme, one.choice.shape)
    if temperature == 0:
        assert {one.scheme for one in field} == {scheme}


def test_the_best_configuration_is_the_first_tree_of_auto() -> None:
    profile = Profile(COSTS, geometric_rates(0.7, 0.1), geometric_rates(0.5, 0.1))
    field = configurations(profile, "mcss-wor", 1.0, is_sampled=True)
    best = max((one for one in field if one.scheme == "mcss-wor"), key=lambda one: one.choice.rate)
    plan = Planner(profile, "mcss-wor")
    assert plan.choose([mcsd.SamplingParams(seed=1)]) == best.choice.shape
