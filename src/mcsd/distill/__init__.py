"""Trains a draft for a target: generates text with the target, trains a head or a small model on it, writes a card."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mcsd.distill.options import DistillOptions

if TYPE_CHECKING:
    from mcsd.distill.distillation import Callbacks, distill

__all__ = ["Callbacks", "DistillOptions", "distill"]

_LAZY = {"Callbacks": "mcsd.distill.distillation", "distill": "mcsd.distill.distillation"}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
