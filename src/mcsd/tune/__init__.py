"""Finding the fastest tree for a pair on a machine, by measurement."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mcsd.tune.options import TuneOptions

if TYPE_CHECKING:
    from mcsd.tune.report import TuneReport
    from mcsd.tune.tuning import tune

__all__ = ["TuneOptions", "TuneReport", "tune"]

_LAZY = {"TuneReport": "mcsd.tune.report", "tune": "mcsd.tune.tuning"}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
