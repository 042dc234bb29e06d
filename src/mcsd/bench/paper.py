"""The systems of ``mcsd bench --paper``: the experiments of arXiv 2401.06706 on one pair."""

from mcsd.bench.experiment import ASSISTED, DRAFT, GENERATE, MULTI, NAIVE, SINGLE, TUNED, System
from mcsd.bench.grid import DEFAULT_SCHEME, PLAIN_SYSTEM, distinct

CONFIGS = ("2x1", "2x2x1", "4x2x1", "4x2x2x1")
"""k-configurations, from narrow to wide."""

SAME_BUDGET = ("chain:8", "2x1x1x1", "4x1", "8")
"""Ablation: eight candidates, from deep to wide."""

ABLATED = "2x2x1"
"""The tree that also runs with replacement, with naive verification, and with the tuned draft."""


def paper(tuned: bool = False, assisted: bool = True) -> list[System]:
    """Baselines, k-configurations, and the ablations: replacement, verification, the shape of a budget, the draft.

    Args:
        tuned: whether there is a second draft, such as the first one fine-tuned.
        assisted: whether the draft can be transformers' assistant: it must be a model.
    """
    systems = [PLAIN_SYSTEM, System(GENERATE)]
    if assisted:
        systems.append(System(ASSISTED))
    systems.append(System(SINGLE, DRAFT, "chain:3", DEFAULT_SCHEME))
    systems += [System(MULTI, DRAFT, tree, DEFAULT_SCHEME) for tree in (*CONFIGS, *SAME_BUDGET)]
    systems += [System(MULTI, DRAFT, ABLATED, "mcss"), System(NAIVE, DRAFT, ABLATED, "naive")]
    if tuned:
        systems += [System(SINGLE, TUNED, "chain:3", DEFAULT_SCHEME), System(MULTI, TUNED, ABLATED, DEFAULT_SCHEME)]
    return distinct(systems)
