"""The systems of ``mcsd bench --paper``: the experiments of arXiv 2401.06706 on one pair."""

from mcsd.bench.experiment import ASSISTED, DRAFT, MULTI, NAIVE, SINGLE, TUNED, System
from mcsd.bench.grid import LOSSLESS, PLAINLY, distinct

CONFIGS = ("2x1", "2x2x1", "4x2x1", "4x2x2x1")
"""k-configurations, narrow to wide."""

SAME_BUDGET = ("chain:8", "2x1x1x1", "4x1", "8")
"""Ablation: eight candidates, deep to wide."""

ABLATED = "2x2x1"
"""The tree that also runs with replacement, verified naively, and with the tuned draft."""


def paper(tuned: bool = False, assisted: bool = True) -> list[System]:
    """Baselines, k-configurations, and the ablations: replacement, verification, the shape of a budget, the draft.

    Args:
        tuned: whether there is a second draft, such as the same after fine-tuning.
        assisted: whether transformers can be assisted by the draft: it must be a model.
    """
    systems = [PLAINLY]
    if assisted:
        systems.append(System(ASSISTED))
    systems.append(System(SINGLE, DRAFT, "chain:3", LOSSLESS))
    systems += [System(MULTI, DRAFT, tree, LOSSLESS) for tree in (*CONFIGS, *SAME_BUDGET)]
    systems += [System(MULTI, DRAFT, ABLATED, "mcss"), System(NAIVE, DRAFT, ABLATED, "naive")]
    if tuned:
        systems += [System(SINGLE, TUNED, "chain:3", LOSSLESS), System(MULTI, TUNED, ABLATED, LOSSLESS)]
    return distinct(systems)
