"""Language models: the protocol, token layouts, the key-value cache, models of transformers, and draft heads.

Importing this package does not import transformers: `TransformersModel` and the draft heads do, on first use.
"""

from typing import TYPE_CHECKING

from mcsd.lazy import lazy_attributes
from mcsd.models.layout import TokenLayout
from mcsd.models.protocol import Cache, DecoderModel, LanguageModel, ModelOutput

if TYPE_CHECKING:
    from mcsd.models.bound_head import BoundHead
    from mcsd.models.draft_head import DraftHead
    from mcsd.models.transformers import TransformersModel

__all__ = [
    "BoundHead",
    "Cache",
    "DecoderModel",
    "DraftHead",
    "LanguageModel",
    "ModelOutput",
    "TokenLayout",
    "TransformersModel",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "BoundHead": "mcsd.models.bound_head",
        "DraftHead": "mcsd.models.draft_head",
        "TransformersModel": "mcsd.models.transformers",
    },
)
