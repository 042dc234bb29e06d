"""Text on disk with the target's hidden states: written once, in shards that are whole or absent, read many times."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcsd.errors import DataError
from mcsd.files import same_settings, save_tensors, tensors_of, unwritable

_SETTINGS, _RUNNING = "settings.json", "running.safetensors"


@dataclass(frozen=True)
class Record:
    """One text.

    Attributes:
        index: its number in the source it came from.
        tokens: int32 ``[n]``.
        states: ``[n, F]``, the target's hidden states at these tokens.
        answer: where the part begins that the target wrote.
    """

    index: int
    tokens: Tensor
    states: Tensor
    answer: int


class Corpus:
    """A folder of shards.

    Args:
        folder: where; made if missing.
        settings: what the text depends on. A folder that holds text made with other settings is refused.

    Raises:
        InvalidOption: the folder's text was made with other settings.
        OutputFailed, WeightsCorrupt: the folder cannot be written; a shard cannot be read.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._unsaved: list[Record] = []
        same_settings(folder / _SETTINGS, settings)
        self.shards = sorted(folder.glob("[0-9]*.safetensors"))
        self._running = folder / _RUNNING
        if self._running.exists():
            # A sitting was broken off: what it had begun is text like any other.
            try:
                self.shards.append(self._running.rename(self._next()))
            except OSError as error:
                raise unwritable(folder, error) from error
        self.lengths: dict[int, int] = {}
        """Tokens of each text, by its index."""
        self.seconds = 0.0
        """Time that went into what is on disk, over all sittings."""
        for path in self.shards:
            with tensors_of(path) as shard:
                ends = shard.get_tensor("ends")
                lengths = ends.diff(prepend=ends.new_zeros(1)).tolist()
                self.lengths.update(zip(shard.get_tensor("index").tolist(), lengths, strict=True))
                self.seconds += float(shard.metadata()["seconds"])
        self._since = time.monotonic()

    @property
    def tokens(self) -> int:
        """Of all texts."""
        return sum(self.lengths.values())

    @classmethod
    def of(cls, folder: Path, target: str, states: Sequence[int]) -> "Corpus":
        """The text of an earlier run, whatever it was made with, as long as ``target`` wrote it and showed ``states``.

        Raises:
            DataError: there is none, or another target wrote it.
        """
        try:
            settings = json.loads((folder / _SETTINGS).read_text())
            writer, shown = settings["target"], settings["states"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder} holds no recorded text: {error!r:.100}", "give the --out of an earlier run"
            ) from error
        if (writer, shown) != (target, list(states)):
            raise DataError(
                f"the text in {folder} is of {writer!r:.80} and its layers {shown!r:.40}, not of {target!r:.80} and "
                f"{list(states)}",
                "write some: leave --data out",
            )
        return cls(folder, settings)

    def add(self, record: Record) -> None:
        """Take a text in; it is on disk after the next `save`."""
        self._unsaved.append(record)
        self.lengths[record.index] = len(record.tokens)

    def save(self, running: Sequence[Record] = ()) -> None:
        """Write what is unsaved as a shard of its own.

        Args:
            running: texts that are being written, as far as they are; they count if they are never finished.

        Raises:
            OutputFailed: no room, or no right, to write it; nothing half-written stays.
        """
        now = time.monotonic()
        if self._unsaved:
            records, self._unsaved = self._unsaved, []
            path = self._next()
            self._write(path, records, now - self._since)
            self.shards.append(path)
            self.seconds += now - self._since
            self._since = now
        if running:
            self._write(self._running, running, now - self._since)
        else:
            self._running.unlink(missing_ok=True)

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
            "states": torch.cat([record.states for record in records]),
        }
        save_tensors(path, tensors, {"seconds": str(seconds)})

    def records(self) -> list[Record]:
        """All texts on disk, in order of index; states are mapped into memory, not read."""
        records: dict[int, Record] = {}
        for path in self.shards:
            with tensors_of(path) as shard:
                index, ends, answer = (shard.get_tensor(name).tolist() for name in ("index", "ends", "answer"))
                tokens, states = shard.get_tensor("tokens"), shard.get_tensor("states")
            starts = [0, *ends[:-1]]
            for number, start, end, written in zip(index, starts, ends, answer, strict=True):
                records[number] = Record(number, tokens[start:end], states[start:end], written)
        return [records[number] for number in sorted(records)]
