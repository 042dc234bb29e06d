"""Checks that an engine's output is the target's: greedy texts token by token, samples by a chi-square test."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mcsd.verify.options import VerifyOptions, check_params, default_tree

if TYPE_CHECKING:
    from mcsd.verify.report import VerificationReport
    from mcsd.verify.verification import verify

__all__ = ["VerificationReport", "VerifyOptions", "check_params", "default_tree", "verify"]

_LAZY = {"VerificationReport": "mcsd.verify.report", "verify": "mcsd.verify.verification"}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
