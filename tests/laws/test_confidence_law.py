"""Laws of drafts that stop early: the tree is cut to what was drafted, by what was drafted."""

import pytest
import torch

import mcsd
from laws.test_exact_engine import PROMPT, check, engine_law, network, target_law
from mcsd.planning import FixedTree
from mcsd.tree import TreeShape
from support.chisquare import runnable


class Confident(FixedTree):
    """A tree whose levels are drafted while a path has at least this probability."""

    def __init__(self, shape: str, min_confidence: float) -> None:
        super().__init__(TreeShape.parse(shape))
        self.min_confidence = min_confidence
        self.depths: set[int] = set()

    def observe(self, outcome: mcsd.planning.StepOutcome) -> None:
        """Keep the depths of the trees that were drafted."""
        self.depths.add(outcome.shape.depth)


FAST = [(scheme, "chain:2") for scheme in ("block", "mcss-wor", "naive", "traversal")]
FAST += [(scheme, "2x1") for scheme in ("mcss-wor", "traversal")]
ALL = runnable("chain:2", "2x1")


@pytest.mark.parametrize(
    ("scheme", "tree"), [*FAST, *(pytest.param(*one, marks=pytest.mark.slow) for one in ALL if one not in FAST)]
)
def test_law_of_texts(scheme: str, tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = network(2, 1), network(2, 2)
    # A chain goes on below the best candidate, and not below the other. A wide tree has both.
    with torch.no_grad():
        best = float((draft(torch.tensor([PROMPT])).logits[0, -1] / 0.8).softmax(-1).max())
    plan = Confident(tree, best - 0.01)
    # One text at a time: a batch is drafted for while any of its texts has such a path.
    engine = mcsd.Engine(target, draft, tree=plan, scheme=scheme, max_batch=1, max_length=16)
    found = engine_law(engine, mcsd.SamplingParams(temperature=0.8, max_new_tokens=3), monkeypatch)
    check(found, target_law(target, 3, 0.8))
    assert plan.depths == {1, 2} or tree == "2x1"
