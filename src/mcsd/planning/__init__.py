"""Planning the tree of each step: acceptance rates, step costs, and the fastest tree that follows from both."""

from mcsd.planning.acceptance import AcceptanceEstimate
from mcsd.planning.costs import StepCosts
from mcsd.planning.look_up import LookUpPlan
from mcsd.planning.plan import FixedTree, Plan, StepOutcome
from mcsd.planning.planner import Planner
from mcsd.planning.profile import Profile, ProfileFile, ProfileStore, profile_file
from mcsd.planning.trials import TEMPERATURES, TrialPlan, measure_forwards, run_trials

__all__ = [
    "TEMPERATURES",
    "AcceptanceEstimate",
    "FixedTree",
    "LookUpPlan",
    "Plan",
    "Planner",
    "Profile",
    "ProfileFile",
    "ProfileStore",
    "StepCosts",
    "StepOutcome",
    "TrialPlan",
    "measure_forwards",
    "profile_file",
    "run_trials",
]
