"""Which tree pays: what candidates are accepted, what steps cost, and the tree that follows from the two."""

from mcsd.planning.acceptance import Acceptance
from mcsd.planning.calibration import TEMPERATURES, Calibration, forward_curve, try_trees
from mcsd.planning.costs import Costs
from mcsd.planning.plan import FixedTree, Outcome, Plan
from mcsd.planning.planner import Planner
from mcsd.planning.profile import Place, Profile, place_of

__all__ = [
    "TEMPERATURES",
    "Acceptance",
    "Calibration",
    "Costs",
    "FixedTree",
    "Outcome",
    "Place",
    "Plan",
    "Planner",
    "Profile",
    "forward_curve",
    "place_of",
    "try_trees",
]
