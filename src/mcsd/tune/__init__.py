"""Finding the tree that pays for a pair on a machine, by measurement."""

from mcsd.tune.report import Contender, Report
from mcsd.tune.run import Options, tune

__all__ = ["Contender", "Options", "Report", "tune"]
