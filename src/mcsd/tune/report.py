"""What was found, for people and for ``--json``."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mcsd.planning import Costs

_PAYS = 1.03
"""Times plain decoding below which speculation is not worth its memory."""


@dataclass(frozen=True)
class Contender:
    """A scheme with a tree, as it ran.

    Attributes:
        scheme, tree: its names.
        predicted: tokens a second that measurements of its parts promised.
        measured: tokens a second, prompts left out.
        times: ``measured`` over that of plain decoding; slowest, fastest: the same of single prompts.
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
class Race:
    """Those that ran at one temperature.

    Attributes:
        temperature: of sampling.
        prompts: that all of them have answered.
        rates: how often the first, second, ... candidate below the root is the accepted one.
        contenders: plain decoding first.
    """

    temperature: float
    prompts: int
    rates: tuple[float, ...]
    contenders: tuple[Contender, ...]

    def winner(self, scheme: str | None = None) -> Contender:
        """The fastest, of all or of one scheme; plain decoding if no other is clearly faster."""
        plain = self.contenders[0]
        fastest = max(
            (one for one in self.contenders if scheme in (None, one.scheme)),
            key=lambda one: one.measured,
            default=plain,
        )
        return fastest if fastest.times >= _PAYS else plain


@dataclass(frozen=True)
class Report:
    """What `mcsd.tune.tune` found.

    Attributes:
        target, draft, scheme: names; the scheme is the one that was asked for.
        costs: of steps.
        races: one a temperature.
        profile: where what auto needs is kept.
    """

    target: str
    draft: str
    scheme: str
    costs: Costs
    races: tuple[Race, ...]
    profile: Path

    def findings(self) -> dict[str, Any]:
        """What a profile keeps of it."""
        return {"races": [asdict(race) for race in self.races]}
