"""What is measured: systems, and under which conditions each of them answers."""

from dataclasses import dataclass
from math import isfinite

from mcsd.errors import InvalidOption
from mcsd.options import check_options

PLAIN, SINGLE, NAIVE, ASSISTED = "plain", "single", "naive", "assisted"
BASELINES = (PLAIN, SINGLE, NAIVE, ASSISTED)
"""Plain decoding, speculative sampling with one candidate, naive verification of several, transformers' own."""

MULTI = "multi"
"""The role of a system that is no baseline."""

DRAFT, TUNED = "draft", "tuned"
"""Which draft: the one that was named, and one to compare with it, such as the same after fine-tuning."""

_MOST = {"max_new_tokens": 1 << 20, "repeats": 1000, "seed": 1 << 32}


@dataclass(frozen=True)
class System:
    """One way to answer, called by what was asked for.

    Attributes:
        role: a name in `BASELINES`, or `MULTI`.
        draft: `DRAFT` or `TUNED`; "" for plain decoding.
        tree, scheme: as `mcsd.Engine` takes them; "" for transformers' assisted generation.
    """

    role: str
    draft: str = DRAFT
    tree: str = ""
    scheme: str = ""

    @property
    def name(self) -> str:
        """How tables call it."""
        if self.role in (PLAIN, ASSISTED):
            return self.role
        return f"{self.tree} {self.scheme}" + (" tuned" if self.draft == TUNED else "")


@dataclass(frozen=True)
class Experiment:
    """Systems and conditions.

    Attributes:
        systems: which, plain decoding among them: speed-ups are to it.
        temperatures: 0 to 10⁴ each.
        batch_sizes: prompts that are answered together, 1 to 256 each.
        max_new_tokens: of a text.
        repeats: how often each prompt is answered, each time with another seed.
        seed: another seed is another experiment; 0 to 2³².

    Raises:
        InvalidOption: a value outside its range, twice the same, or no plain decoding.
        InvalidTree, UnknownScheme: a system that cannot be.
    """

    systems: tuple[System, ...]
    temperatures: tuple[float, ...] = (0.0, 1.0)
    batch_sizes: tuple[int, ...] = (1,)
    max_new_tokens: int = 64
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            value = getattr(self, name)
            least = 0 if name == "seed" else 1
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise InvalidOption(
                    f"{name}={value!r:.40} is not a whole number from {least} to {most}", f"give such a {name}"
                )
        if not all(isfinite(value) and 0 <= value <= 1e4 for value in self.temperatures):
            raise InvalidOption(f"temperatures={self.temperatures!r:.60}: not all from 0 to 10000", "0 is greedy")
        if not all(isinstance(size, int) and 1 <= size <= 256 for size in self.batch_sizes):
            raise InvalidOption(f"batch_sizes={self.batch_sizes!r:.60}: not all from 1 to 256", "1 is a prompt alone")
        for name in ("systems", "temperatures", "batch_sizes"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InvalidOption(f"{name}={values!r:.80}: none, or one twice", "give each once")
        if PLAIN not in {system.role for system in self.systems}:
            raise InvalidOption("no plain decoding among the systems", "add it: speed-ups are to it")
        for system in self.systems:
            if system.role != ASSISTED:
                check_options(system.scheme, system.tree, 1, 1)

    def systems_at(self, temperature: float, batch: int) -> list[System]:
        """Those that answer there.

        At temperature 0 candidates are the likeliest ones whatever the scheme, so of systems with the same draft and
        tree the first one stands for all. Transformers' assisted generation answers one prompt at a time.
        """
        chosen: dict[tuple[object, ...], System] = {}
        for number, system in enumerate(self.systems):
            if system.role != ASSISTED or batch == 1:
                same = (system.draft, system.tree) if temperature == 0 and system.role != ASSISTED else (number,)
                chosen.setdefault(same, system)
        return list(chosen.values())
