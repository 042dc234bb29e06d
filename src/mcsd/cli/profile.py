"""``--profile``: the time of each part of a step, compared with the limit set by memory bandwidth."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from mcsd.cli.output import columns
from mcsd.results import Chunk, Stats

if TYPE_CHECKING:
    import torch

    from mcsd.engine import Engine

_BYTES = 1 << 28
"""Size of the buffer that measures memory bandwidth; larger than CPU caches."""


@dataclass(frozen=True)
class StepPart:
    """One part of an average step.

    Attributes:
        name: draft, target, judge, commit or other.
        seconds: of wall time.
        weight_bytes: bytes of weights that its forwards read.
        cache_bytes: bytes of the KV cache, as of the start of the step, that they read.
        least: seconds to read both at the memory's bandwidth.
    """

    name: str
    seconds: float
    weight_bytes: float
    cache_bytes: float
    least: float


@dataclass(frozen=True)
class StepProfile:
    """An average step.

    Attributes:
        steps: number of steps measured.
        bandwidth: of memory, in bytes per second.
        parts: of the step.
        precision: weight format and kernels of target and draft.
        scheme: that verified.
        tree: of the last step.
        draft_tokens, accepted_tokens: candidates verified, and accepted.
    """

    steps: int
    bandwidth: float
    parts: tuple[StepPart, ...]
    precision: dict[str, str]
    scheme: str
    tree: str
    draft_tokens: int
    accepted_tokens: int


class StepProfiler:
    """Measures the steps of an engine that run after its construction.

    Args:
        engine: not used by anything else meanwhile.
    """

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        engine.clock.synchronize = True
        self._before, self._levels = engine.seconds, engine.draft_levels

    def profile(self, chunks: Sequence[Chunk]) -> StepProfile:
        """The average step of the one request that has run since, given all its chunks."""
        engine, steps = self._engine, len(chunks)
        after, rate = engine.seconds, bandwidth(engine.target.device)
        tokens = _mean_cached_tokens(chunks)
        # The draft reads its weights and KV cache once per level of the tree.
        levels = (engine.draft_levels - self._levels) / steps
        reads = dict.fromkeys(("draft", "target", "judge", "commit", "other"), (0.0, 0.0))
        draft, cache = (getattr(engine.drafter, name, None) for name in ("model", "cache"))
        reads["draft"] = levels * weight_bytes(draft), levels * (cache.bytes_per_token if cache else 0) * tokens
        reads["target"] = weight_bytes(engine.target), engine.cache.bytes_per_token * tokens
        parts = [
            StepPart(name, (after[name] - self._before[name]) / steps, *both, sum(both) / rate)
            for name, both in reads.items()
        ]
        precision = {"target": getattr(engine.target, "precision", ""), "draft": getattr(draft, "precision", "")}
        stats = _stats(chunks)
        shape = engine.scheme_name, str(engine.tree), stats.draft_tokens, stats.accepted_tokens
        return StepProfile(steps, rate, tuple(parts), precision, *shape)


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a forward of a few tokens reads: all but the embeddings, of which it reads a few rows."""
    from torch import nn

    modules = getattr(model, "weights", nn.Module()).modules()
    read = [module for module in modules if not isinstance(module, nn.Embedding)]
    tensors = [tensor for module in read for tensor in (*module._parameters.values(), *module._buffers.values())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _mean_cached_tokens(chunks: Sequence[Chunk]) -> float:
    """Average number of tokens in the KV cache at the start of a step: all but the last one."""
    lengths = accumulate((len(chunk.token_ids) for chunk in chunks[:-1]), initial=_stats(chunks).prompt_tokens - 1)
    return sum(lengths) / len(chunks)


def _stats(chunks: Sequence[Chunk]) -> Stats:
    done = chunks[-1].completion
    assert done is not None
    return done.stats


def bandwidth(device: "torch.device | str") -> float:
    """Bytes per second read by a sum, the best of five measurements."""
    import torch

    buffer = torch.ones(_BYTES // 4, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        buffer.sum().item()
        seconds.append(time.perf_counter() - start)
    return _BYTES / min(seconds)


def profile_table(profile: StepProfile) -> list[str]:
    """A profile as a readable table, line by line."""
    total = sum(part.seconds for part in profile.parts)
    rows = [
        ("PART", "MS", "SHARE", "WEIGHTS", "KV CACHE", "MEMORY LIMIT", "TIMES LIMIT"),
        *(_row(part, total) for part in profile.parts),
    ]
    return [
        *(f"{model}: {precision}" for model, precision in profile.precision.items() if precision),
        f"scheme: {profile.scheme}; tree: {profile.tree}; "
        f"{profile.accepted_tokens} of {profile.draft_tokens} candidates accepted",
        f"{profile.steps} steps of {1e3 * total:.1f} ms; memory bandwidth {profile.bandwidth / 1e9:.1f} GB/s",
        *(f"  {line}" for line in columns(rows)),
    ]


def _row(part: StepPart, total: float) -> tuple[str, ...]:
    share = part.seconds / total if total else 0.0
    memory = ("", "", "", "")
    if part.least:
        sizes = (f"{part.weight_bytes / 1e6:.0f} MB", f"{part.cache_bytes / 1e6:.1f} MB")
        memory = (*sizes, f"{1e3 * part.least:.1f} ms", f"{part.seconds / part.least:.1f}")
    return (part.name, f"{1e3 * part.seconds:.2f}", f"{share:.1%}", *memory)
