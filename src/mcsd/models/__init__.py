"""Language models: the protocol, the key-value cache, and transformers' models behind the protocol."""

from mcsd.models.base import Block, Cache, LanguageModel, Output
from mcsd.models.transformers import TransformersModel

__all__ = ["Block", "Cache", "LanguageModel", "Output", "TransformersModel"]
