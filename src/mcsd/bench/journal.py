"""Measurements on disk, a JSON object a line, written as they come: a kill loses what was in flight and no more."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from mcsd.errors import DataError
from mcsd.files import append_line, save_text


@dataclass(frozen=True)
class Answered:
    """One request to one system: a prompt, or a batch of prompts that were answered together.

    Attributes:
        system, role, draft, tree, scheme: who, as in `mcsd.bench.System`.
        prompts, numbers, temperature, repeat, seeds: what, as in `mcsd.bench.plan.Job`.
        prompt_tokens: of each prompt; token_ids: the new tokens of each.
        seconds: of wall time, prefill included.
        parts: of those, by part of the engine: prefill, draft, target, judge, commit, other. Empty for transformers.
        target_calls, draft_tokens, accepted_tokens: of each prompt, as in `mcsd.Stats`; empty for transformers.
        histogram: entry i counts the target calls that emitted i candidates, over all prompts.
    """

    system: str
    role: str
    draft: str
    tree: str
    scheme: str
    prompts: str
    numbers: Sequence[int]
    temperature: float
    repeat: int
    seeds: Sequence[int]
    prompt_tokens: Sequence[int]
    token_ids: Sequence[Sequence[int]]
    seconds: float
    parts: dict[str, float]
    target_calls: Sequence[int]
    draft_tokens: Sequence[int]
    accepted_tokens: Sequence[int]
    histogram: Sequence[int]

    @property
    def key(self) -> tuple[object, ...]:
        """That of its `mcsd.bench.plan.Job`."""
        return (self.system, self.prompts, tuple(self.numbers), self.temperature, self.repeat)

    @property
    def new_tokens(self) -> int:
        """Of all prompts together."""
        return sum(map(len, self.token_ids))


@dataclass(frozen=True)
class Accepted:
    """Candidates along one text of the target.

    Attributes:
        draft: as in `mcsd.bench.System`; scheme: that drew and judged.
        prompts, number, temperature: which text.
        tried: positions, times draws at each.
        within: entry k - 1: at how many of those one of the first k candidates was accepted.
    """

    draft: str
    scheme: str
    prompts: str
    number: int
    temperature: float
    tried: int
    within: Sequence[int]

    @property
    def key(self) -> tuple[object, ...]:
        """Tells it from all others of an experiment."""
        return (self.draft, self.scheme, self.prompts, self.number, self.temperature)


@dataclass(frozen=True)
class Verified:
    """Two forwards of the target over the same candidates: as a tree, and as a batch of its paths.

    Attributes:
        tree: as it was asked for; nodes: its candidates; paths: root to leaf, rows of the batch; depth: of the tree.
        round: the how-manieth time.
        tree_seconds, batch_seconds: of the forwards.
    """

    tree: str
    nodes: int
    paths: int
    depth: int
    round: int
    tree_seconds: float
    batch_seconds: float

    @property
    def key(self) -> tuple[object, ...]:
        """Tells it from all others of an experiment."""
        return (self.tree, self.round)


Entry = TypeVar("Entry", Answered, Accepted, Verified)


class Journal(Generic[Entry]):
    """The measurements of one kind.

    Args:
        path: the file; it need not be there.
        kind: of its entries.

    Attributes:
        entries: those that have been measured, in order.

    Raises:
        DataError: a line that is none of them. The last one may be broken: it was being written, and is dropped.
        OutputFailed: the file cannot be written.
    """

    def __init__(self, path: Path, kind: type[Entry]) -> None:
        self._path = path
        self.entries: list[Entry] = []
        try:
            text = path.read_text() if path.exists() else ""
        except (OSError, UnicodeError) as error:
            raise DataError(f"{path} cannot be read: {error}", "delete the folder, or choose another") from error
        whole, _, broken = text.rpartition("\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self.entries.append(kind(**json.loads(line)))
            except (ValueError, TypeError, RecursionError) as error:
                raise DataError(
                    f"{path} holds no measurement in line {number}: {error!r:.80}", "delete the line, or the folder"
                ) from error
        if broken:
            save_text(path, whole + "\n" if whole else "")
        self._done = {entry.key for entry in self.entries}

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._done

    def append(self, entry: Entry) -> None:
        """Keep a measurement, as `append_line` does.

        Raises:
            OutputFailed: the disk is full, or the folder cannot be written.
        """
        append_line(self._path, asdict(entry))
        self.entries.append(entry)
        self._done.add(entry.key)
