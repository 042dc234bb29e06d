"""Calibration: measuring a pair before the first request, for tree "auto"."""

from typing import Any

from mcsd.core import EngineCore
from mcsd.drafters import Drafter, MixedDrafter, NgramDrafter
from mcsd.errors import NonFiniteLogits, RequestError
from mcsd.models import LanguageModel
from mcsd.planning import (
    FixedTree,
    LookUpPlan,
    Plan,
    Planner,
    Profile,
    ProfileStore,
    TrialPlan,
    measure_forwards,
    run_trials,
)
from mcsd.prompts import default_prompts
from mcsd.tree import TreeShape

_MAX_LENGTH = 512
"""The most tokens of a text that calibration generates."""


def calibrated_plan(
    target: LanguageModel,
    drafter: Drafter,
    scheme: str,
    tokenizer: Any | None,
    max_length: int,
    file: ProfileStore | None,
) -> Plan:
    """The plan of tree "auto": by the profile in a file, or measured now and kept there.

    Args:
        target, drafter, scheme: of the engine, which must be idle.
        tokenizer: of the target.
        max_length: the most tokens of a request.
        file: where the profile is kept; None: nowhere.
    """
    if isinstance(drafter, MixedDrafter):
        drafter = drafter.drawn  # Of drafters together the draft is measured.
    profile = file.read(scheme) if file else None
    if profile is None:
        profile = _measure(target, drafter, scheme, tokenizer, min(max_length, _MAX_LENGTH))
        if file and profile:
            # Another process may have been faster, and generated texts by its profile.
            known = file.read(scheme)
            if known is None:
                file.try_write(scheme, profile)
            profile = known or profile
    # Without a distribution of target or draft, the waiting request reports the error.
    if profile is None:
        return FixedTree(TreeShape.parse("1"))
    if isinstance(drafter, NgramDrafter):
        plan = LookUpPlan(profile.costs)
        drafter.cost = plan.seconds
        return plan
    return Planner(profile, scheme)


def _measure(
    target: LanguageModel, drafter: Drafter, scheme: str, tokenizer: Any | None, max_length: int
) -> Profile | None:
    """Measure with one sequence; None if target or draft give no distribution."""
    trial = TrialPlan(scheme, drafter.is_sampled)
    core = EngineCore(target, drafter, scheme, trial, trial.max_nodes, tokenizer, max_length=max_length)
    core.clock.synchronize = True
    if isinstance(drafter, NgramDrafter):
        # So that it proposes all that it finds.
        drafter.cost = lambda batch_size, nodes: 1 / (1 + nodes)
    try:
        prompts = default_prompts(core.encoder)
    except RequestError:
        # There is no tokenizer, its template refuses them, or they are too long.
        prompts = [[0]]
    try:
        run_trials(trial, prompts, max_length, lambda text, params: core.run([core.request(text, params)])[0].token_ids)
    except NonFiniteLogits:
        return None
    return trial.profile(measure_forwards(target, drafter.hidden_layers))
