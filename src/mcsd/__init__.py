"""mcsd: multi-candidate speculative decoding. Faster generation whose output follows the target's law exactly."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mcsd import errors
from mcsd.params import Chunk, Completion, SamplingParams, Stats, TokenLogprobs

if TYPE_CHECKING:
    from mcsd.engine import Engine
    from mcsd.schemes import SCHEMES
    from mcsd.tree import TreeShape

__version__ = "0.1.0"

__all__ = [
    "SCHEMES",
    "Chunk",
    "Completion",
    "Engine",
    "SamplingParams",
    "Stats",
    "TokenLogprobs",
    "TreeShape",
    "__version__",
    "errors",
]

_LATE = {"Engine": "mcsd.engine", "SCHEMES": "mcsd.schemes", "TreeShape": "mcsd.tree"}
_ROOMS = ("models", "drafters", "testing")


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for, so that the command line starts without."""
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    if name in _ROOMS:
        return import_module(f"mcsd.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
