"""mcsd: multi-candidate speculative decoding. Faster generation whose output follows the target's law exactly."""

from mcsd import errors
from mcsd.engine import Engine
from mcsd.params import Chunk, Completion, SamplingParams, Stats, TokenLogprobs
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
