"""How much a verification does."""

from dataclasses import dataclass
from math import isfinite

from mcsd.errors import InvalidOption

FEWEST = 500
"""Samples of a context below which a test of it is not worth its name."""

_MOST_CONTEXTS, _MOST_SAMPLES = 256, 10_000_000


@dataclass(frozen=True)
class Options:
    """How much to do.

    Attributes:
        contexts: that are sampled after, 1 to 256.
        samples: of each, 500 to 10⁷.
        minutes: for all of it. Where they are too few, fewer texts, contexts and samples are taken, but never less
            than 8 texts and 500 samples of one context.

    Raises:
        InvalidOption: a value outside its range.
    """

    contexts: int = 8
    samples: int = 2000
    minutes: float = 10.0

    def __post_init__(self) -> None:
        bounds = {"contexts": (1, _MOST_CONTEXTS), "samples": (FEWEST, _MOST_SAMPLES)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise InvalidOption(
                    f"{name}={value!r:.40} is not a whole number from {low} to {high}", f"give such {name}"
                )
        if not (isfinite(self.minutes) and self.minutes > 0):
            raise InvalidOption(f"minutes={self.minutes} is not a number above 0", "give the minutes that it may take")
