"""Language models: the protocol, the key-value cache, and transformers' models behind the protocol."""

from mcsd.models.base import Block, Cache, LanguageModel, Output
from mcsd.models.head import BoundHead, DraftHead
from mcsd.models.transformers import TransformersModel

__all__ = ["Block", "BoundHead", "Cache", "DraftHead", "LanguageModel", "Output", "TransformersModel"]
