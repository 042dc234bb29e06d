"""Laws of drafts that read a part of each text: q is another one, the output is not."""

from collections.abc import Sequence

import pytest

import mcsd
from laws.test_exact_engine import check, engine_law, network, target_law
from mcsd.planning import FixedTree
from mcsd.tree import TreeShape
from support.chisquare import runnable


class Forgetful(FixedTree):
    """The first step is plain. Then the draft reads nothing of a text before the root."""

    def __init__(self, shape: str) -> None:
        super().__init__(TreeShape.parse(shape))
        self.unread: list[int] = []

    def stretches(self, unread: Sequence[int], remaining: Sequence[int]) -> list[int] | None:
        self.unread += unread
        return None if 3 in remaining else [0] * len(unread)


FAST = [(scheme, "chain:2") for scheme in ("block", "mcss-wor", "traversal")]
ALL = runnable("chain:2", "2x1")


@pytest.mark.parametrize(
    ("scheme", "tree"), [*FAST, *(pytest.param(*one, marks=pytest.mark.slow) for one in ALL if one not in FAST)]
)
def test_law_of_texts(scheme: str, tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every step but the first lags.
    monkeypatch.setattr("mcsd.drafters.level.MAX_LAG", 0)
    target, draft = network(2, 1), network(2, 2)
    plan = Forgetful(tree)
    engine = mcsd.Engine(target, draft, tree=plan, scheme=scheme, max_batch=1, max_length=16)
    found = engine_law(engine, mcsd.SamplingParams(temperature=0.8, max_new_tokens=3), monkeypatch)
    check(found, target_law(target, 3, 0.8))
    assert {1, 2} <= set(plan.unread)
