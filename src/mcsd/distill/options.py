"""Options of `mcsd distill`."""

import shlex
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

from mcsd.errors import InvalidOption, check_int, check_number

KINDS = ("head", "eagle3", "model")
LOSSES = ("kl", "reverse-kl", "tv")
HIDDEN_STATES = ("stored", "computed")
_ADDED = ("ttt_steps", "hidden_states")
"""Options that runs of earlier versions do not know: their folders can be resumed with the defaults."""


@dataclass(frozen=True)
class DistillOptions:
    """Options of a run, named as those of ``mcsd distill``.

    Attributes:
        target: the model to train a draft for.
        out: output folder.
        kind: "head"; "eagle3", a head that other programs can load; or "model".
        layers: of the draft; None: 1 for a head, all of ``init``, an eighth of the target's without one.
        init: the draft to start from: a head of this kind, or for "eagle3" also of kind "head"; or a model, instead of
            the target, which is pruned if ``layers`` is given.
        vocab: size of the draft vocabulary; None: 8192 for a head, the full vocabulary for a model.
        ttt_steps: of a head: levels of the tree that it is trained on; None: 2.
        minutes: for text and training together; steps: of training, instead of minutes.
        tokens: maximum number of tokens of training text.
        prompts: a file of prompts to answer; data: a text file, or the folder of an earlier run to take the text of.
        hidden_states: of the target: "stored" with the text, or "computed" in every training step.
        loss: one of `LOSSES`.
        batch: batch size of text generation.
        seed: of text and training.
        device: "auto", "cpu", "cuda", ...

    Raises:
        InvalidOption: a value outside its range, or two options that exclude each other.
    """

    target: str
    out: Path
    kind: str = "head"
    layers: int | None = None
    init: str | None = None
    vocab: int | None = None
    ttt_steps: int | None = None
    minutes: float = 60.0
    steps: int | None = None
    tokens: int = 1_000_000
    prompts: Path | None = None
    data: Path | None = None
    hidden_states: str = "stored"
    loss: str = "kl"
    batch: int = 96
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("loss", LOSSES), ("hidden_states", HIDDEN_STATES)):
            if (value := getattr(self, name)) not in known:
                raise InvalidOption(f"{name} {value!r:.40} is unknown", f"one of {', '.join(known)}")
        bounds = {"layers": 64, "vocab": 1 << 22, "ttt_steps": 16, "steps": 1 << 30, "tokens": 1 << 36}
        bounds |= {"batch": 1024, "seed": 1 << 31}
        for name, high in bounds.items():
            if (value := getattr(self, name)) is not None:
                check_int(name, value, 0 if name == "seed" else 1, high)
        check_number("minutes", self.minutes, 0, 1e6, low_open=True)
        if self.kind == "model" and self.ttt_steps:
            raise InvalidOption("ttt_steps is for heads only", "leave it out")
        if self.kind != "model" and self.init and (self.layers or (self.vocab and self.kind == "head")):
            raise InvalidOption("a head keeps the layers and the vocabulary of init", "leave out layers and vocab")
        if self.prompts and self.data:
            raise InvalidOption("prompts and data exclude each other", "give one of them")

    def command(self) -> str:
        """The command line with these options."""
        words = ["mcsd distill"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (field.default is MISSING or value != field.default):
                words.append(f"--{field.name.replace('_', '-')} {shlex.quote(str(value))}")
        return " ".join(words)

    @property
    def steps_ahead(self) -> int:
        """Levels of the tree that the draft is trained on."""
        return 1 if self.kind == "model" else self.ttt_steps or 2

    def settings(self) -> dict[str, str]:
        """All options that the draft depends on, except the length of training."""
        budget = ("out", "minutes", "steps", "tokens", "device")
        defaults = {field.name: field.default for field in fields(self) if field.name in _ADDED}
        return {
            name: str(value)
            for name, value in asdict(self).items()
            if name not in budget and (name not in defaults or value != defaults[name])
        }
