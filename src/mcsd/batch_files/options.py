"""The options of an offline batch. Imports no torch."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mcsd.config import EngineOptions, parse_tree
from mcsd.errors import check_int
from mcsd.server import ServerOptions

_VERSION = 1
_SPEED = ("device", "compile", "max_batch", "prefix_cache")
"""Options of the engine that change its speed only."""


@dataclass(frozen=True)
class BatchOptions:
    """What is answered, by which engine.

    Attributes:
        input: a file of requests, a JSON object a line.
        output: the file of answers. If it has some, the batch goes on after them.
        engine: of models, tree and scheme.
        served_name: the name of the model in requests and answers; None: that of the target.
        seed: the seeds of requests that name none follow from it, and from their lines.

    Raises:
        InvalidOption: a value outside its range.
    """

    input: Path
    output: Path
    engine: EngineOptions = field(default_factory=EngineOptions)
    served_name: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("seed", self.seed, 0, (1 << 64) - 1)
        ServerOptions(served_name=self.served_name)

    @property
    def key(self) -> bytes:
        """A digest of all options that answers depend on."""
        engine = {name: str(value) for name, value in asdict(self.engine).items() if name not in _SPEED}
        shape = parse_tree(self.engine.scheme, self.engine.tree)
        engine["tree"] = "auto" if shape is None else str(shape)
        settings = {"version": _VERSION, "engine": engine, "served_name": self.served_name, "seed": self.seed}
        return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode()).digest()
