"""Training text on disk with the target's hidden states, in shards that are whole or absent."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcsd.distill.settings import VERSION_KEY, check_run_settings
from mcsd.errors import DataError
from mcsd.files import open_tensors, save_tensors, write_error

_SETTINGS, _UNFINISHED = "settings.json", "running.safetensors"


@dataclass(frozen=True)
class Record:
    """One text.

    Attributes:
        index: number of the text in its source.
        tokens: int32 ``[n]``.
        hidden_states: ``[n, F]``, the target's at these tokens; F is 0 if they are not stored.
        answer: position of the first token that the target generated.
    """

    index: int
    tokens: Tensor
    hidden_states: Tensor
    answer: int


class Corpus:
    """A folder of shards.

    Args:
        folder: created if missing.
        settings: all that the text depends on. A folder with other settings is refused.

    Raises:
        InvalidOption: the folder has other settings or another format version.
        OutputFailed, WeightsCorrupt: the folder cannot be written; a shard cannot be read.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._unsaved: list[Record] = []
        check_run_settings(folder / _SETTINGS, settings)
        self.shards = sorted(folder.glob("[0-9]*.safetensors"))
        self._unfinished = folder / _UNFINISHED
        if self._unfinished.exists():
            # An earlier run was interrupted: its unfinished texts are used as they are.
            try:
                self.shards.append(self._unfinished.rename(self._next()))
            except OSError as error:
                raise write_error(folder, error) from error
        self.lengths: dict[int, int] = {}
        """Number of tokens of each text, by index."""
        self.seconds = 0.0
        """Time spent on the text on disk, over all runs."""
        for path in self.shards:
            with open_tensors(path) as shard:
                ends = shard.get_tensor("ends")
                lengths = ends.diff(prepend=ends.new_zeros(1)).tolist()
                self.lengths.update(zip(shard.get_tensor("index").tolist(), lengths, strict=True))
                self.seconds += float(shard.metadata()["seconds"])
        self._since = time.monotonic()

    @property
    def tokens(self) -> int:
        """Number of tokens of all texts."""
        return sum(self.lengths.values())

    @classmethod
    def of(cls, folder: Path, target: str, layers: Sequence[int]) -> "Corpus":
        """The text of an earlier run of the same ``target`` with hidden states of the same ``layers``, if any.

        Raises:
            DataError: there is none, or it is of another target.
            InvalidOption: its format version is unknown.
        """
        try:
            settings = json.loads((folder / _SETTINGS).read_text())
            its_target, its_layers = settings["target"], settings["states"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder} has no training text: {error!r:.100}", "give the --out folder of an earlier run"
            ) from error
        if its_target != target or (layers and its_layers != list(layers)):
            raise DataError(
                f"the text in {folder} is of {its_target!r:.80} and its layers {its_layers!r:.40}, not of "
                f"{target!r:.80} and {list(layers)}",
                "leave --data out to generate new text",
            )
        settings.pop(VERSION_KEY, None)
        return cls(folder, settings)

    def add(self, record: Record) -> None:
        """Add a text; the next `save` writes it."""
        self._unsaved.append(record)
        self.lengths[record.index] = len(record.tokens)

    def save(self, unfinished: Sequence[Record] = ()) -> None:
        """Write the unsaved texts as a new shard.

        Args:
            unfinished: texts that are being generated; used if the run is interrupted before the next `save`.

        Raises:
            OutputFailed: the disk is full or the folder is not writable; no partial file stays.
        """
        now = time.monotonic()
        if self._unsaved:
            records, self._unsaved = self._unsaved, []
            path = self._next()
            self._write(path, records, now - self._since)
            self.shards.append(path)
            self.seconds += now - self._since
            self._since = now
        if unfinished:
            self._write(self._unfinished, unfinished, now - self._since)
        else:
            self._unfinished.unlink(missing_ok=True)

    def _next(self) -> Path:
        number = int(self.shards[-1].stem) + 1 if self.shards else 0
        return self.folder / f"{number:05d}.safetensors"

    @staticmethod
    def _write(path: Path, records: Sequence[Record], seconds: float) -> None:
        lengths = torch.tensor([len(record.tokens) for record in records])
        tensors = {
            "index": torch.tensor([record.index for record in records]),
            "ends": lengths.cumsum(0),
            "answer": torch.tensor([record.answer for record in records]),
            "tokens": torch.cat([record.tokens for record in records]),
            "states": torch.cat([record.hidden_states for record in records]),
        }
        save_tensors(path, tensors, {"seconds": str(seconds)})

    def records(self) -> list[Record]:
        """All texts on disk, in order of index; hidden states are memory-mapped."""
        records: dict[int, Record] = {}
        for path in self.shards:
            with open_tensors(path) as shard:
                index, ends, answer = (shard.get_tensor(name).tolist() for name in ("index", "ends", "answer"))
                tokens, states = shard.get_tensor("tokens"), shard.get_tensor("states")
            starts = [0, *ends[:-1]]
            for number, start, end, written in zip(index, starts, ends, answer, strict=True):
                records[number] = Record(number, tokens[start:end], states[start:end], written)
        return [records[number] for number in sorted(records)]
