"""From measurements to figures: sums over prompts, ratios of sums, intervals."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mcsd.bench.experiment import PLAIN
from mcsd.bench.intervals import Interval, jackknife
from mcsd.bench.journal import Accepted, Answered, Verified

ALL = "all"
"""In place of the name of a set of prompts: all sets together."""

STEP = ("draft", "target", "judge", "commit", "other")
"""Parts of a step. Prefill is none."""


@dataclass(frozen=True)
class Speed:
    """One system under one set of conditions.

    Attributes:
        prompts: a set's name, or `ALL`; temperature, batch: the conditions.
        system, role, draft, tree, scheme: as in `mcsd.bench.System`.
        requests: texts; new_tokens: of all of them.
        tokens_per_second: all new tokens by all wall time, prefill included.
        speedup: of that over plain decoding of the same prompts.
        block_efficiency: all new tokens by all target calls; None where they are not told.
        mean_acceptance_length: the mean over texts of a text's tokens by its calls.
        draft_acceptance_rate: the share of verified candidates that were emitted.
        candidates: verified a target call.
        step: milliseconds of an average step, by part.
    """

    prompts: str
    temperature: float
    batch: int
    system: str
    role: str
    draft: str
    tree: str
    scheme: str
    requests: int
    new_tokens: int
    tokens_per_second: Interval
    speedup: Interval
    block_efficiency: Interval | None
    mean_acceptance_length: float | None
    draft_acceptance_rate: float | None
    candidates: float | None
    step: Mapping[str, float]


@dataclass(frozen=True)
class Acceptance:
    """How often one of the first k candidates was accepted.

    Attributes:
        prompts: a set's name, or `ALL`; temperature: of text and judgement.
        draft, scheme: who proposed and how it was judged.
        texts, positions: where it was looked.
        within: entry k - 1 is the share for k candidates.
    """

    prompts: str
    temperature: float
    draft: str
    scheme: str
    texts: int
    tried: int
    within: tuple[Interval, ...]


@dataclass(frozen=True)
class Attention:
    """A tree in one row against a row for each of its paths.

    Attributes:
        tree, nodes, paths, depth: the candidates.
        tree_ms, batch_ms: of a forward of the target, on average.
        times: as fast, the tree.
    """

    tree: str
    nodes: int
    paths: int
    depth: int
    tree_ms: float
    batch_ms: float
    times: Interval


@dataclass(frozen=True)
class Results:
    """All figures of an experiment, and what they depend on."""

    speeds: tuple[Speed, ...]
    acceptances: tuple[Acceptance, ...]
    attentions: tuple[Attention, ...]
    manifest: Mapping[str, Any]

    def best(self) -> list[Speed]:
        """The fastest system at each temperature and batch size, over all prompts; plain decoding may be it."""
        fastest: dict[tuple[float, int], Speed] = {}
        for row in overall(self.speeds):
            kept = fastest.get((row.temperature, row.batch))
            if kept is None or row.tokens_per_second.value > kept.tokens_per_second.value:
                fastest[row.temperature, row.batch] = row
        return list(fastest.values())


def overall(rows: Iterable[Any]) -> list[Any]:
    """Of `Speed` or `Acceptance`, the rows over all prompts."""
    rows = list(rows)
    several = any(row.prompts == ALL for row in rows)
    return [row for row in rows if row.prompts == ALL or not several]


def speeds(answered: Sequence[Answered]) -> list[Speed]:
    """A row for each system and set of conditions, in the order in which they were first met."""
    rows = []
    for prompts in _sets(answered):
        chosen = [entry for entry in answered if prompts in (entry.prompts, ALL)]
        for temperature, batch in sorted({(entry.temperature, len(entry.numbers)) for entry in chosen}):
            here = [e for e in chosen if (e.temperature, len(e.numbers)) == (temperature, batch)]
            plain = [entry for entry in here if entry.role == PLAIN]
            for system in dict.fromkeys(entry.system for entry in answered):
                mine = [entry for entry in here if entry.system == system]
                if mine:
                    rows.append(_speed(prompts, mine, plain))
    return rows


def _sets(entries: Iterable[Answered | Accepted]) -> list[str]:
    names = list(dict.fromkeys(entry.prompts for entry in entries))
    return [*names, ALL] if len(names) > 1 else names


def _speed(prompts: str, mine: Sequence[Answered], plain: Sequence[Answered]) -> Speed:
    first = mine[0]
    sums = torch.cat([_sums(mine), _sums(plain)], dim=1)
    told = all(entry.target_calls for entry in mine)
    calls = sum(sum(entry.target_calls) for entry in mine)
    drafted = sum(sum(entry.draft_tokens) for entry in mine)
    accepted = sum(sum(entry.accepted_tokens) for entry in mine)
    # Rows of a batch begin together, so the longest one is there at every step.
    steps = sum(max(entry.target_calls, default=0) for entry in mine)
    lengths = [
        len(text) / count
        for entry in mine
        for text, count in zip(entry.token_ids, entry.target_calls, strict=False)
        if count
    ]
    return Speed(
        *(prompts, first.temperature, len(first.numbers)),
        *(first.system, first.role, first.draft, first.tree, first.scheme),
        requests=sum(len(entry.numbers) for entry in mine),
        new_tokens=sum(entry.new_tokens for entry in mine),
        tokens_per_second=jackknife(sums, lambda s: s[..., 0] / s[..., 1]),
        speedup=jackknife(sums, lambda s: s[..., 0] / s[..., 1] / (s[..., 3] / s[..., 4])),
        block_efficiency=jackknife(sums, lambda s: s[..., 0] / s[..., 2]) if told else None,
        mean_acceptance_length=sum(lengths) / len(lengths) if told else None,
        draft_acceptance_rate=accepted / drafted if drafted else None,
        candidates=drafted / calls if told else None,
        step={part: 1e3 * sum(entry.parts[part] for entry in mine) / steps for part in STEP} if told else {},
    )


def _sums(entries: Sequence[Answered]) -> Tensor:
    """float64 ``[n, 3]``: new tokens, seconds and target calls of each of n prompts, or batches, in order of name."""
    units: dict[tuple[Any, ...], list[float]] = {}
    for entry in entries:
        unit = units.setdefault((entry.prompts, *entry.numbers), [0.0, 0.0, 0.0])
        for i, value in enumerate((entry.new_tokens, entry.seconds, sum(entry.target_calls))):
            unit[i] += value
    return torch.tensor([units[key] for key in sorted(units)], dtype=torch.float64)


def acceptances(accepted: Sequence[Accepted]) -> list[Acceptance]:
    """A row for each draft, scheme, set of prompts and temperature."""
    rows = []
    for prompts in _sets(accepted):
        chosen = [entry for entry in accepted if prompts in (entry.prompts, ALL)]
        for key in dict.fromkeys((entry.temperature, entry.draft, entry.scheme) for entry in chosen):
            mine = [entry for entry in chosen if (entry.temperature, entry.draft, entry.scheme) == key]
            sums = torch.tensor([[entry.tried, *entry.within] for entry in mine], dtype=torch.float64)
            within = tuple(
                jackknife(sums[:, [0, k]], lambda s: s[..., 1] / s[..., 0], most=1.0) for k in range(1, sums.shape[1])
            )
            rows.append(Acceptance(prompts, *key, len(mine), sum(entry.tried for entry in mine), within))
    return rows


def attentions(verified: Sequence[Verified]) -> list[Attention]:
    """A row for each tree."""
    rows = []
    for tree in dict.fromkeys(entry.tree for entry in verified):
        mine = [entry for entry in verified if entry.tree == tree]
        sums = torch.tensor([[entry.tree_seconds, entry.batch_seconds] for entry in mine], dtype=torch.float64)
        tree_ms, batch_ms = (1e3 * sums.mean(0)).tolist()
        times = jackknife(sums, lambda s: s[..., 1] / s[..., 0])
        rows.append(Attention(tree, mine[0].nodes, mine[0].paths, mine[0].depth, tree_ms, batch_ms, times))
    return rows


def flat(row: Speed | Acceptance | Attention) -> dict[str, Any]:
    """A row with an entry a column: of an interval its value, low and high, of a dict or list each entry."""
    columns: dict[str, Any] = {}
    for name, value in asdict(row).items():
        if isinstance(value, dict) and "value" in value:
            columns |= {name: value["value"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
        elif isinstance(value, dict):
            columns |= {f"{name}_{part}_ms": value.get(part) for part in STEP}
        elif isinstance(value, tuple):
            for k, interval in enumerate(value, 1):
                columns |= {f"k{k}": interval["value"], f"k{k}_low": interval["low"], f"k{k}_high": interval["high"]}
        elif name == "block_efficiency":
            columns |= dict.fromkeys((name, f"{name}_low", f"{name}_high"))
        else:
            columns[name] = value
    return columns
