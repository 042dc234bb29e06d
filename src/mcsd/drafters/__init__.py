"""Where candidates come from."""

from mcsd.drafters.base import Drafter
from mcsd.drafters.head import HeadDrafter
from mcsd.drafters.levels import TOGETHER
from mcsd.drafters.model import ModelDrafter
from mcsd.drafters.ngram import NgramDrafter

__all__ = ["TOGETHER", "Drafter", "HeadDrafter", "ModelDrafter", "NgramDrafter"]
