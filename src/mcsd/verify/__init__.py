"""Checking that an engine says what its target says: greedy texts word by word, samples against the exact law."""

from mcsd.verify.options import Options
from mcsd.verify.report import Report
from mcsd.verify.run import check_params, tree_for, verify

__all__ = ["Options", "Report", "check_params", "tree_for", "verify"]
