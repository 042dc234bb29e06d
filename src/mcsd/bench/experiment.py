"""What is measured: systems, and the conditions under which each of them answers."""

import hashlib
from dataclasses import dataclass
from math import isfinite

from mcsd.config import parse_tree
from mcsd.errors import InvalidOption, check_int
from mcsd.tree import TreeShape

PLAIN, SINGLE, NAIVE = "plain", "single", "naive"
"""Baselines in the engine: plain decoding, one candidate a step, and naive verification of several."""

GENERATE, LOOKUP, ASSISTED = TRANSFORMERS = ("generate", "lookup", "assisted")
"""Baselines of transformers: ``model.generate``, the same with prompt look-up, and with an assistant model."""

BASELINES = (PLAIN, SINGLE, NAIVE, *TRANSFORMERS)

PEER = "peer"
"""The role of another program: see `mcsd.bench.peers`."""

MULTI = "multi"
"""The role of a system that is no baseline."""

DRAFT, TUNED = "draft", "tuned"
"""Which draft: the first one, or one to compare with it, such as the same after fine-tuning."""

_MAX_TREE_NAME = 24
"""Characters of a list of parents that still serves as a name."""

_MAXIMUM = {"max_new_tokens": 1 << 20, "repeats": 1000, "seed": 1 << 32}


@dataclass(frozen=True)
class System:
    """One system under comparison.

    Attributes:
        role: a name in `BASELINES`, `PEER` or `MULTI`.
        draft: `DRAFT` or `TUNED`; "" for plain decoding and peers.
        tree, scheme: as `mcsd.Engine` takes them; "" outside the engine. Results have `tree_name` of the tree.
        peer: the name of a peer.
    """

    role: str
    draft: str = DRAFT
    tree: str = ""
    scheme: str = ""
    peer: str = ""

    @property
    def name(self) -> str:
        """As all tables, figures and files show it."""
        if not self.in_engine or self.role == PLAIN:
            return self.peer or self.role
        return f"{tree_name(self.tree)} {self.scheme}" + (" tuned" if self.draft == TUNED else "")

    @property
    def in_engine(self) -> bool:
        """Whether `mcsd.Engine` runs it; the others answer one prompt at a time and report tokens and time only."""
        return self.role != PEER and self.role not in TRANSFORMERS


def tree_name(tree: str) -> str:
    """The short name of a tree: level counts as the user wrote them, the name of a file, or "auto".

    A list of parents is named by its level counts, if it has any. A long one without them gets its number of candidates
    and a digest; the manifest has its parents.
    """
    if tree in ("", "auto"):
        return tree
    shape = TreeShape.parse(tree)
    name = str(shape)
    if name.startswith("parents:") and len(name) > _MAX_TREE_NAME:
        return f"tree{len(shape)}-{hashlib.sha256(name.encode()).hexdigest()[:4]}"
    return name


@dataclass(frozen=True)
class Experiment:
    """Systems and conditions.

    Attributes:
        systems: all of them, plain decoding included: speed-ups are relative to it.
        temperatures: 0 to 10⁴ each.
        batch_sizes: prompts that are answered together, 1 to 256 each.
        max_new_tokens: of a text.
        repeats: how often each prompt is answered, each time with another seed; the median repeat gives the speed.
        seed: another seed is another experiment; 0 to 2³².

    Raises:
        InvalidOption: a value outside its range, a duplicate, or no plain decoding.
        InvalidTree, UnknownScheme: a system whose tree or scheme does not exist or cannot be combined.
    """

    systems: tuple[System, ...]
    temperatures: tuple[float, ...] = (0.0, 1.0)
    batch_sizes: tuple[int, ...] = (1,)
    max_new_tokens: int = 64
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, high in _MAXIMUM.items():
            check_int(name, getattr(self, name), 0 if name == "seed" else 1, high)
        if not all(isfinite(value) and 0 <= value <= 1e4 for value in self.temperatures):
            raise InvalidOption(f"temperatures={self.temperatures!r:.60}: not all from 0 to 10000", "0 is greedy")
        if not all(isinstance(size, int) and 1 <= size <= 256 for size in self.batch_sizes):
            raise InvalidOption(f"batch_sizes={self.batch_sizes!r:.60}: not all from 1 to 256", "1 is a prompt alone")
        names = tuple(system.name for system in self.systems)
        for name in ("systems", "temperatures", "batch_sizes"):
            values = names if name == "systems" else getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InvalidOption(f"{name}={values!r:.80}: none, or one twice", "give each once")
        if PLAIN not in {system.role for system in self.systems}:
            raise InvalidOption("no plain decoding among the systems", "add it: speed-ups are relative to it")
        for system in self.systems:
            if system.in_engine:
                parse_tree(system.scheme, system.tree)

    def systems_at(self, temperature: float, batch: int) -> list[System]:
        """The systems that answer under these conditions.

        At temperature 0 candidates are the most probable tokens whatever the scheme, so systems with the same draft
        and tree run once. Systems outside the engine answer batches of one.
        """
        chosen: dict[tuple[str, ...], System] = {}
        for system in self.systems:
            if system.in_engine or batch == 1:
                greedy = temperature == 0 and system.in_engine
                chosen.setdefault((system.draft, system.tree) if greedy else (system.name,), system)
        return list(chosen.values())
