"""The models of an experiment, loaded once and shared by all systems."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcsd.bench.experiment import ASSISTED, DRAFT, TRANSFORMERS, TUNED, System
from mcsd.bench.peers import Peer
from mcsd.bench.transformers_baselines import TransformersBaselines
from mcsd.config import LoadOptions
from mcsd.cpu.weight_plan import Role, plan_weights
from mcsd.errors import InvalidOption
from mcsd.loading.catalog import default_draft, locate
from mcsd.loading.load import load_draft, load_pair, resolve_device, resolve_dtype
from mcsd.loading.published_heads import is_head
from mcsd.models import LanguageModel

_NO_NETWORK = "transformers does not run this target"


@dataclass(frozen=True)
class BenchModels:
    """Loaded models, and running peers.

    Attributes:
        target: the target.
        tokenizer: of the target; without one, prompts are token ids.
        drafts: by `mcsd.bench.experiment.DRAFT` or ``TUNED``: a model, a `mcsd.models.BoundHead`, or "ngram".
        transformers: the baselines of transformers. By default they run on the networks of target and draft, if those
            are `mcsd.models.TransformersModel`; None where they cannot.
        peers: by name.
    """

    target: LanguageModel
    tokenizer: Any | None
    drafts: Mapping[str, Any]
    transformers: TransformersBaselines | None = None
    peers: Mapping[str, Peer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.transformers is None:
            found = TransformersBaselines.of(self.target, self.drafts.get(DRAFT))
            object.__setattr__(self, "transformers", found)

    def left_out(self, systems: Iterable[System], batch_sizes: Sequence[int], prompt: list[int]) -> dict[str, str]:
        """Why systems outside the engine cannot run, by name; ``prompt`` is one to try."""
        reasons: dict[str, str] = {}
        for system in systems:
            if not system.in_engine and 1 not in batch_sizes:
                reasons[system.name] = "it answers one prompt at a time, and there are no batches of one"
            elif system.role in TRANSFORMERS:
                baselines = self.transformers
                fault = _NO_NETWORK if baselines is None else baselines.fault(system.role, prompt)
                if fault is not None:
                    reasons[system.name] = fault
        return reasons


@dataclass(frozen=True)
class BenchModelOptions(LoadOptions):
    """Which models, and how they are loaded.

    Attributes:
        tuned: a second draft, to compare with the first.
    """

    tuned: str | None = None

    def drafts(self) -> dict[str, str | Path]:
        """The drafts by `DRAFT` and `TUNED`. Without a name: the target's default draft, else "ngram"."""
        named: dict[str, str | Path] = {DRAFT: default_draft(self.target) if self.draft is None else self.draft}
        return named | ({TUNED: self.tuned} if self.tuned is not None else {})

    def check(self) -> None:
        """Check device, quantization and names before weights are read.

        Raises:
            InvalidOption, UnknownModel: by name.
        """
        device = resolve_device(self.device)
        plan_weights(device, resolve_dtype(self.dtype, device), Role.TARGET, self.quantize)
        for name in (self.target, *self.drafts().values()):
            if name != "ngram":
                locate(name)

    def can_assist(self) -> bool:
        """Whether the draft can be transformers' assistant: it must be a model."""
        draft = self.drafts()[DRAFT]
        return draft != "ngram" and not is_head(draft)

    def load(self, systems: list[System], peers: Mapping[str, Peer]) -> BenchModels:
        """Load the models that systems need; transformers' baselines have copies of their own.

        Raises:
            ModelError, InvalidOption: as `mcsd.Engine.load`; or `ASSISTED` is asked for and the draft is no model.
        """
        baselines = {system.role for system in systems} & set(TRANSFORMERS)
        if ASSISTED in baselines and not self.can_assist():
            raise InvalidOption(
                f"baseline assisted, and draft {self.drafts()[DRAFT]!r:.60} is no model", "leave the baseline out"
            )
        names = self.drafts()
        pair = load_pair(self)
        loaded = pair.target
        drafts = {DRAFT: pair.draft}
        if TUNED in names:
            drafts[TUNED] = load_draft(names[TUNED], loaded, self.quantize)
        transformers = None
        if baselines:
            assistant = names[DRAFT] if ASSISTED in baselines else None
            where = loaded.model.device, loaded.model.dtype
            transformers = TransformersBaselines.load(self.target, assistant, *where)
        return BenchModels(loaded.model, loaded.tokenizer, drafts, transformers, peers)

    def files(self) -> dict[str, list[Path]]:
        """The weight files on this machine of target and drafts, by "target", `DRAFT` and `TUNED`."""
        named = {"target": self.target, **self.drafts()}
        return {label: [] if name == "ngram" else _files(name) for label, name in named.items()}


def _files(name: str | Path) -> list[Path]:
    location = locate(name)
    if location.kind == "gguf":
        return [Path(location.source) / str(location.file)]
    folder = Path(location.source)
    if location.kind == "hub":
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(location.source, local_files_only=True))
        except LocalEntryNotFoundError:
            return []
    return sorted(folder.glob("*.safetensors"))
