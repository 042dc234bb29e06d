"""The options of ``mcsd tune``. Imports no torch."""

from dataclasses import dataclass
from math import inf

from mcsd.config import EngineOptions, LoadOptions, check_sizes, option, parse_tree, same_option
from mcsd.errors import check_number


@dataclass(frozen=True)
class TuneOptions(LoadOptions):
    """What to tune, and for how long.

    Attributes:
        scheme, max_length: as in `mcsd.Engine.load`.
        minutes: in all. However few, every configuration answers one prompt at each temperature.

    Raises:
        InvalidOption, UnknownScheme: a value outside its range.
    """

    scheme: str = same_option(EngineOptions, "scheme")
    max_length: int | None = same_option(EngineOptions, "max_length")
    minutes: float = option(
        10.0, "--minutes", help="In all. The next run resumes an interrupted one.", type=float, panel="Tuning"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_tree(self.scheme, "auto")
        check_sizes(1, self.max_length)
        check_number("minutes", self.minutes, 0, inf, low_open=True)
