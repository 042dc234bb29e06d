"""Drafters: where candidates come from."""

from mcsd.drafters.base import Drafter
from mcsd.drafters.head import HeadDrafter
from mcsd.drafters.level import MAX_LAG
from mcsd.drafters.mixed import MAX_CHAIN, MixedDrafter, with_look_up
from mcsd.drafters.model import ModelDrafter
from mcsd.drafters.ngram import NgramDrafter

__all__ = [
    "MAX_CHAIN",
    "MAX_LAG",
    "Drafter",
    "HeadDrafter",
    "MixedDrafter",
    "ModelDrafter",
    "NgramDrafter",
    "with_look_up",
]
