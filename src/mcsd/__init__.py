"""mcsd: multi-candidate speculative decoding. Faster, and the output follows the target's distribution exactly."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mcsd import errors
from mcsd.lazy import lazy_attributes
from mcsd.params import SamplingParams
from mcsd.results import Chunk, Completion, Stats, TokenLogprobs
from mcsd.step_trace import StepTrace

if TYPE_CHECKING:
    from mcsd.async_engine import AsyncEngine
    from mcsd.engine import Engine
    from mcsd.schemes import SCHEMES
    from mcsd.tree import TreeShape

__version__ = "0.2.0"

__all__ = [
    "SCHEMES",
    "AsyncEngine",
    "Chunk",
    "Completion",
    "Engine",
    "SamplingParams",
    "Stats",
    "StepTrace",
    "TokenLogprobs",
    "TreeShape",
    "__version__",
    "errors",
]

_lazy = lazy_attributes(
    __name__,
    {
        "AsyncEngine": "mcsd.async_engine",
        "Engine": "mcsd.engine",
        "SCHEMES": "mcsd.schemes",
        "TreeShape": "mcsd.tree",
    },
)
_PACKAGES = ("models", "drafters", "hf", "ray", "testing")


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used, so that the command line starts without it."""
    return import_module(f"mcsd.{name}") if name in _PACKAGES else _lazy(name)
