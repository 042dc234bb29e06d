"""Options of `mcsd verify`: the amount of work."""

from dataclasses import dataclass
from math import inf

from mcsd.errors import InvalidParameter, check_int, check_number
from mcsd.params import SamplingParams
from mcsd.schemes.registry import REGISTRY

MIN_SAMPLES = 500
"""Samples per context below which the test has too little power."""

_MAX_CONTEXTS, _MAX_SAMPLES = 256, 10_000_000


@dataclass(frozen=True)
class VerifyOptions:
    """The amount of work.

    Attributes:
        contexts: number of contexts to sample at, 1 to 256.
        samples: per context, 500 to 10⁷.
        minutes: for everything. If they are too short, fewer texts, contexts and samples are checked, but at least 8
            texts and 500 samples at one context.

    Raises:
        InvalidOption: a value outside its range.
    """

    contexts: int = 8
    samples: int = 2000
    minutes: float = 10.0

    def __post_init__(self) -> None:
        check_int("contexts", self.contexts, 1, _MAX_CONTEXTS)
        check_int("samples", self.samples, MIN_SAMPLES, _MAX_SAMPLES)
        check_number("minutes", self.minutes, 0, inf, low_open=True)


def default_tree(scheme: str) -> str:
    """The tree to check if none is named: "auto" might choose plain decoding, which checks nothing."""
    known = REGISTRY.get(scheme)
    return "chain:3" if known and known.max_width == 1 else "2x2x1"


def check_params(params: SamplingParams) -> None:
    """Check that the parameters give a distribution to sample from.

    Raises:
        InvalidParameter: the temperature is 0.
    """
    if params.temperature == 0:
        raise InvalidParameter(
            "temperature=0 is always checked; the samples need another", "give a temperature above 0"
        )
