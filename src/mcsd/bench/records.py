"""Measurements as they are logged, a JSON object a line: see `mcsd.files.JsonlLog`."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RequestRecord:
    """One request to one system: a prompt, or a batch of prompts that were answered together.

    Attributes:
        system, role, draft, scheme: as in `mcsd.bench.System`; tree: its `mcsd.bench.experiment.tree_name`.
        prompts, numbers, temperature, repeat, seeds: as in `mcsd.bench.schedule.BenchJob`.
        prompt_tokens: of each prompt; token_ids: the new tokens of each.
        seconds: of wall time, prefill included.
        parts: the same by part of the engine: prefill, draft, target, judge, commit, other. Empty outside the engine.
        target_calls, draft_tokens, accepted_tokens: of each prompt, as in `mcsd.Stats`; empty outside the engine.
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
        """That of its `mcsd.bench.schedule.BenchJob`."""
        return (self.system, self.prompts, tuple(self.numbers), self.temperature, self.repeat)

    @property
    def new_tokens(self) -> int:
        """Of all prompts together."""
        return sum(map(len, self.token_ids))


@dataclass(frozen=True)
class AcceptanceRecord:
    """Acceptance along one text of the target.

    Attributes:
        draft: as in `mcsd.bench.System`; scheme: that drew and verified.
        prompts, number, temperature: of the text.
        tried: positions, times draws at each.
        within: entry k - 1 counts those at which one of the first k candidates was accepted.
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
        """Unique in an experiment."""
        return (self.draft, self.scheme, self.prompts, self.number, self.temperature)


@dataclass(frozen=True)
class AttentionRecord:
    """Two forwards of the target over the same candidates: as a tree, and as a batch of its paths.

    Attributes:
        tree: its `mcsd.bench.experiment.tree_name`; nodes: its candidates; paths: from root to leaf, sequences of the
            batch; depth: of the tree.
        repeat: index of the repeat.
        tree_seconds, batch_seconds: of the forwards.
    """

    tree: str
    nodes: int
    paths: int
    depth: int
    repeat: int
    tree_seconds: float
    batch_seconds: float

    @property
    def key(self) -> tuple[object, ...]:
        """Unique in an experiment."""
        return (self.tree, self.repeat)
