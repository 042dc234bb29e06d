"""Checks that an engine's output is the target's: greedy texts token by token, samples by a chi-square test."""

from typing import TYPE_CHECKING

from mcsd.lazy import lazy_attributes
from mcsd.verify.options import VerifyOptions, check_params, default_tree

if TYPE_CHECKING:
    from mcsd.verify.report import VerificationReport
    from mcsd.verify.verification import verify

__all__ = ["VerificationReport", "VerifyOptions", "check_params", "default_tree", "verify"]

__getattr__ = lazy_attributes(
    __name__, {"VerificationReport": "mcsd.verify.report", "verify": "mcsd.verify.verification"}
)
