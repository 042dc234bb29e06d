"""The findings of ``mcsd tune``: for the terminal, ``--json`` and the profile."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mcsd.planning import StepCosts

_MIN_SPEEDUP = 1.03
"""Speed-up over plain decoding below which speculation is not worth its memory."""


@dataclass(frozen=True)
class ConfigurationResult:
    """The speed of a scheme with a tree.

    Attributes:
        scheme, tree: their names.
        predicted: tokens a second, by the cost model.
        measured: tokens a second, prefill excluded.
        times: the speed-up over plain decoding; slowest, fastest: the same of single prompts.
        acceptance_length: tokens a target call.
    """

    scheme: str
    tree: str
    predicted: float
    measured: float
    times: float
    slowest: float
    fastest: float
    acceptance_length: float


@dataclass(frozen=True)
class ConfigurationComparison:
    """The configurations that ran at one temperature.

    Attributes:
        temperature: of sampling.
        prompts: how many all configurations have answered.
        rates: how often the first, second, ... candidate below the root is accepted.
        configurations: plain decoding first.
    """

    temperature: float
    prompts: int
    rates: tuple[float, ...]
    configurations: tuple[ConfigurationResult, ...]

    def best(self, scheme: str | None = None) -> ConfigurationResult:
        """The fastest, of all or of one scheme; plain decoding if no other is clearly faster."""
        plain = self.configurations[0]
        fastest = max(
            (one for one in self.configurations if scheme in (None, one.scheme)),
            key=lambda one: one.measured,
            default=plain,
        )
        return fastest if fastest.times >= _MIN_SPEEDUP else plain


@dataclass(frozen=True)
class TuneReport:
    """The result of `mcsd.tune.tune`.

    Attributes:
        target, draft: names; scheme: the one that was asked for.
        costs: of steps.
        comparisons: one a temperature.
        profile: the file that ``tree="auto"`` reads.
    """

    target: str
    draft: str
    scheme: str
    costs: StepCosts
    comparisons: tuple[ConfigurationComparison, ...]
    profile: Path

    def findings(self) -> dict[str, Any]:
        """The part that a profile keeps."""
        return {"comparisons": [asdict(comparison) for comparison in self.comparisons]}
