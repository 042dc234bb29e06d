"""Language models: the protocol, token layouts, the key-value cache, models of transformers, and draft heads.

Importing this package does not import transformers: `TransformersModel` and the draft heads do, on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mcsd.models.layout import TokenLayout
from mcsd.models.protocol import Cache, DecoderModel, LanguageModel, ModelOutput

if TYPE_CHECKING:
    from mcsd.models.draft_head import BoundHead, DraftHead
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

_LAZY = {
    "BoundHead": "mcsd.models.draft_head",
    "DraftHead": "mcsd.models.draft_head",
    "TransformersModel": "mcsd.models.transformers",
}


def __getattr__(name: str) -> Any:
    """Import what needs transformers when it is first used."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
