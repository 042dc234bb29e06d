"""Finding the fastest tree for a pair on a machine, by measurement."""

from typing import TYPE_CHECKING

from mcsd.lazy import lazy_attributes
from mcsd.tune.options import TuneOptions

if TYPE_CHECKING:
    from mcsd.tune.report import TuneReport
    from mcsd.tune.tuning import tune

__all__ = ["TuneOptions", "TuneReport", "tune"]

__getattr__ = lazy_attributes(__name__, {"TuneReport": "mcsd.tune.report", "tune": "mcsd.tune.tuning"})
