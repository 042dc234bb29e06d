"""The models of an experiment, loaded once; all systems share them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcsd.bench.assisted import Assisted
from mcsd.bench.experiment import DRAFT, TUNED
from mcsd.catalog import default_draft, locate
from mcsd.errors import InvalidOption
from mcsd.models import LanguageModel
from mcsd.models.loading import choose_device, choose_dtype, is_head, load_draft, load_pair
from mcsd.models.quantization import check_quantize


@dataclass(frozen=True)
class Models:
    """Loaded.

    Attributes:
        target: the target.
        tokenizer: of the target; without one, prompts are token ids.
        drafts: by `mcsd.bench.experiment.DRAFT` or ``TUNED``: a model, a `mcsd.models.BoundHead`, or "ngram".
        assisted: target and draft as transformers has them, if it takes part.
    """

    target: LanguageModel
    tokenizer: Any | None
    drafts: Mapping[str, Any]
    assisted: Assisted | None = None


@dataclass(frozen=True)
class Weights:
    """Which weights, and how they are loaded: as in `mcsd.Engine.load`.

    Attributes:
        target, draft, device, dtype, quantize, compile: as there.
        tuned: a second draft, to compare with the first.
    """

    target: str = "smollm2-135m"
    draft: str | None = None
    tuned: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None
    compile: bool = False

    def drafts(self) -> dict[str, str]:
        """The drafts by `DRAFT` and `TUNED`; the target's default draft, else look-up, where none is named."""
        named = {DRAFT: self.draft or default_draft(self.target)}
        return named | ({TUNED: self.tuned} if self.tuned is not None else {})

    def check(self) -> None:
        """Say what is wrong before a gigabyte is read.

        Raises:
            InvalidOption, UnknownModel: an option or a name that is wrong.
        """
        device = choose_device(self.device)
        choose_dtype(self.dtype, device)
        check_quantize(self.quantize, device)
        for name in (self.target, *self.drafts().values()):
            if name != "ngram":
                locate(name)

    def can_assist(self) -> bool:
        """Whether transformers can be assisted by the draft: it must be a model."""
        draft = self.drafts()[DRAFT]
        return draft != "ngram" and not is_head(draft)

    def load(self, assisted: bool) -> Models:
        """Load all models.

        Args:
            assisted: whether transformers takes part, with copies of its own.

        Raises:
            ModelError, InvalidOption: as `mcsd.Engine.load`; or transformers is asked for and cannot be assisted.
        """
        if assisted and not self.can_assist():
            raise InvalidOption(
                f"baseline assisted, and draft {self.drafts()[DRAFT]!r:.60} is no model", "leave the baseline out"
            )
        names = self.drafts()
        loaded, draft = load_pair(self.target, names[DRAFT], self.device, self.dtype, self.quantize, self.compile)
        drafts = {DRAFT: draft}
        if TUNED in names:
            tuned = names[TUNED]
            drafts[TUNED] = tuned if tuned == "ngram" else load_draft(tuned, loaded, self.quantize, self.compile)
        peer = None
        if assisted:
            peer = Assisted.load(self.target, names[DRAFT], loaded.model.device, loaded.model.network.dtype)
        return Models(loaded.model, loaded.tokenizer, drafts, peer)

    def files(self) -> dict[str, list[Path]]:
        """The weight files of target and drafts, by "target", `DRAFT` and `TUNED`; none of what only the hub has."""
        named = {"target": self.target, **self.drafts()}
        return {label: [] if name == "ngram" else _files(name) for label, name in named.items()}


def _files(name: str) -> list[Path]:
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
