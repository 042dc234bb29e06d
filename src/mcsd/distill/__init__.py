"""Trains a draft for a target: generates text with the target, trains a head or a small model on it, writes a card."""

from typing import TYPE_CHECKING

from mcsd.distill.options import DistillOptions
from mcsd.lazy import lazy_attributes

if TYPE_CHECKING:
    from mcsd.distill.distillation import Callbacks, distill

__all__ = ["Callbacks", "DistillOptions", "distill"]

__getattr__ = lazy_attributes(
    __name__, {"Callbacks": "mcsd.distill.distillation", "distill": "mcsd.distill.distillation"}
)
