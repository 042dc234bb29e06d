"""From measurements to rows of tables: sums over prompts, ratios of sums, intervals."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mcsd.bench.experiment import GENERATE, PLAIN
from mcsd.bench.intervals import Interval, jackknife
from mcsd.bench.records import AcceptanceRecord, AttentionRecord, RequestRecord

ALL_PROMPTS = "all"
"""In place of the name of a prompt set: all sets together."""

LEFT_OUT = "left_out"
"""In the manifest: why systems do not run, by name."""

STEP_PARTS = ("draft", "target", "judge", "commit", "other")
"""Parts of a step. Prefill is not part of a step."""

_MODEL_PARTS = ("prefill", "draft", "target")


@dataclass(frozen=True)
class SpeedRow:
    """One system under one set of conditions.

    Attributes:
        prompts: a set's name, or `ALL_PROMPTS`; temperature, batch: the conditions.
        system, role, draft, tree, scheme: as in `mcsd.bench.System`.
        requests: texts; new_tokens: of all of them.
        tokens_per_second: new tokens by wall time, prefill included; of each prompt the median repeat counts.
        speedup: of that over plain decoding of the same prompts.
        speedup_generate: the same over transformers' ``model.generate``; None where that was not measured.
        block_efficiency: all new tokens by all target calls; None outside the engine, as are the following.
        mean_acceptance_length: the mean over texts of a text's tokens by its calls.
        draft_acceptance_rate: the share of verified candidates that were emitted.
        candidates: verified a target call.
        overhead: the share of the time outside prefill, drafting and the target's forwards.
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
    speedup_generate: Interval | None
    block_efficiency: Interval | None
    mean_acceptance_length: float | None
    draft_acceptance_rate: float | None
    candidates: float | None
    overhead: float | None
    step: Mapping[str, float]


@dataclass(frozen=True)
class AcceptanceRow:
    """How often one of the first k candidates was accepted.

    Attributes:
        prompts: a set's name, or `ALL_PROMPTS`; temperature: of text and verification.
        draft, scheme: that proposed and verified.
        texts: how many; tried: positions, times draws at each.
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
class AttentionRow:
    """A tree in one sequence against a sequence for each of its paths.

    Attributes:
        tree, nodes, paths, depth: the candidates.
        tree_ms, batch_ms: of a forward of the target, on average.
        times: the speed-up of the tree over the batch.
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
    """All rows of an experiment, and its manifest."""

    speeds: tuple[SpeedRow, ...]
    acceptances: tuple[AcceptanceRow, ...]
    attentions: tuple[AttentionRow, ...]
    manifest: Mapping[str, Any]

    @property
    def left_out(self) -> Mapping[str, str]:
        """Why systems do not run, by name."""
        return dict(self.manifest.get(LEFT_OUT, {}))

    def best(self) -> list[SpeedRow]:
        """The fastest system over all prompts at each temperature and batch size; it may be plain decoding."""
        fastest: dict[tuple[float, int], SpeedRow] = {}
        for row in overall(self.speeds):
            kept = fastest.get((row.temperature, row.batch))
            if kept is None or row.tokens_per_second.value > kept.tokens_per_second.value:
                fastest[row.temperature, row.batch] = row
        return list(fastest.values())


def overall(rows: Iterable[Any]) -> list[Any]:
    """Of `SpeedRow` or `AcceptanceRow`, the rows over all prompts."""
    rows = list(rows)
    several = any(row.prompts == ALL_PROMPTS for row in rows)
    return [row for row in rows if row.prompts == ALL_PROMPTS or not several]


def speed_rows(records: Sequence[RequestRecord]) -> list[SpeedRow]:
    """A row for each system and set of conditions, in order of first appearance."""
    rows = []
    for prompts in _prompt_sets(records):
        chosen = [record for record in records if prompts in (record.prompts, ALL_PROMPTS)]
        for temperature, batch in sorted({(record.temperature, len(record.numbers)) for record in chosen}):
            here = [r for r in chosen if (r.temperature, len(r.numbers)) == (temperature, batch)]
            plain, generate = ([record for record in here if record.role == role] for role in (PLAIN, GENERATE))
            for system in dict.fromkeys(record.system for record in records):
                mine = [record for record in here if record.system == system]
                if mine:
                    rows.append(_speed_row(prompts, mine, plain, generate))
    return rows


def _prompt_sets(records: Iterable[RequestRecord | AcceptanceRecord]) -> list[str]:
    names = list(dict.fromkeys(record.prompts for record in records))
    return [*names, ALL_PROMPTS] if len(names) > 1 else names


def _speed_row(
    prompts: str,
    mine: Sequence[RequestRecord],
    plain: Sequence[RequestRecord],
    generate: Sequence[RequestRecord],
) -> SpeedRow:
    first = mine[0]
    in_engine = all(record.target_calls for record in mine)
    calls = sum(sum(record.target_calls) for record in mine)
    drafted = sum(sum(record.draft_tokens) for record in mine)
    accepted = sum(sum(record.accepted_tokens) for record in mine)
    # Sequences of a batch begin together, so the longest one takes part in every step.
    steps = sum(max(record.target_calls, default=0) for record in mine)
    seconds = {part: sum(record.parts[part] for record in mine) for part in mine[0].parts} if in_engine else {}
    lengths = [
        len(text) / count
        for record in mine
        for text, count in zip(record.token_ids, record.target_calls, strict=False)
        if count
    ]
    return SpeedRow(
        *(prompts, first.temperature, len(first.numbers)),
        *(first.system, first.role, first.draft, first.tree, first.scheme),
        requests=sum(len(record.numbers) for record in mine),
        new_tokens=sum(record.new_tokens for record in mine),
        tokens_per_second=jackknife(_sums(_median_repeats(mine)), lambda s: s[..., 0] / s[..., 1]),
        speedup=_speedup(mine, plain),
        speedup_generate=_speedup(mine, generate) if generate else None,
        block_efficiency=jackknife(_sums(mine), lambda s: s[..., 0] / s[..., 2]) if in_engine else None,
        mean_acceptance_length=sum(lengths) / len(lengths) if in_engine else None,
        draft_acceptance_rate=accepted / drafted if drafted else None,
        candidates=drafted / calls if in_engine else None,
        overhead=1 - sum(seconds[part] for part in _MODEL_PARTS) / sum(seconds.values()) if in_engine else None,
        step={part: 1e3 * seconds[part] / steps for part in STEP_PARTS} if in_engine else {},
    )


def _speedup(mine: Sequence[RequestRecord], other: Sequence[RequestRecord]) -> Interval:
    """Of tokens/s over those of another system on the same prompts."""
    speeds = torch.cat([_sums(_median_repeats(mine)), _sums(_median_repeats(other))], dim=1)
    return jackknife(speeds, lambda s: s[..., 0] / s[..., 1] / (s[..., 3] / s[..., 4]))


def _median_repeats(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    """Of each prompt, or batch of prompts, the repeat whose time a token is the median (the upper one of two)."""
    repeats: dict[tuple[Any, ...], list[RequestRecord]] = {}
    for record in records:
        repeats.setdefault((record.prompts, *record.numbers), []).append(record)
    return [
        sorted(each, key=lambda record: record.seconds / max(record.new_tokens, 1))[len(each) // 2]
        for each in repeats.values()
    ]


def _sums(records: Sequence[RequestRecord]) -> Tensor:
    """float64 ``[n, 3]``: new tokens, seconds and target calls of each of n prompts, or batches, in order of name."""
    units: dict[tuple[Any, ...], list[float]] = {}
    for record in records:
        unit = units.setdefault((record.prompts, *record.numbers), [0.0, 0.0, 0.0])
        for i, value in enumerate((record.new_tokens, record.seconds, sum(record.target_calls))):
            unit[i] += value
    return torch.tensor([units[key] for key in sorted(units)], dtype=torch.float64)


def acceptance_rows(records: Sequence[AcceptanceRecord]) -> list[AcceptanceRow]:
    """A row for each draft, scheme, prompt set and temperature."""
    rows = []
    for prompts in _prompt_sets(records):
        chosen = [record for record in records if prompts in (record.prompts, ALL_PROMPTS)]
        for key in dict.fromkeys((record.temperature, record.draft, record.scheme) for record in chosen):
            mine = [record for record in chosen if (record.temperature, record.draft, record.scheme) == key]
            sums = torch.tensor([[record.tried, *record.within] for record in mine], dtype=torch.float64)
            within = tuple(
                jackknife(sums[:, [0, k]], lambda s: s[..., 1] / s[..., 0], maximum=1.0)
                for k in range(1, sums.shape[1])
            )
            rows.append(AcceptanceRow(prompts, *key, len(mine), sum(record.tried for record in mine), within))
    return rows


def attention_rows(records: Sequence[AttentionRecord]) -> list[AttentionRow]:
    """A row for each tree."""
    rows = []
    for tree in dict.fromkeys(record.tree for record in records):
        mine = [record for record in records if record.tree == tree]
        sums = torch.tensor([[record.tree_seconds, record.batch_seconds] for record in mine], dtype=torch.float64)
        tree_ms, batch_ms = (1e3 * sums.mean(0)).tolist()
        times = jackknife(sums, lambda s: s[..., 1] / s[..., 0])
        rows.append(AttentionRow(tree, mine[0].nodes, mine[0].paths, mine[0].depth, tree_ms, batch_ms, times))
    return rows


def flatten(row: SpeedRow | AcceptanceRow | AttentionRow) -> dict[str, Any]:
    """A row with an entry a column: of an interval its value, low and high, of a dict or tuple each entry."""
    columns: dict[str, Any] = {}
    for name, value in asdict(row).items():
        if isinstance(value, dict) and "value" in value:
            columns |= {name: value["value"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
        elif isinstance(value, dict):
            columns |= {f"{name}_{part}_ms": value.get(part) for part in STEP_PARTS}
        elif isinstance(value, tuple):
            for k, interval in enumerate(value, 1):
                columns |= {f"k{k}": interval["value"], f"k{k}_low": interval["low"], f"k{k}_high": interval["high"]}
        elif name in ("speedup_generate", "block_efficiency"):
            columns |= dict.fromkeys((name, f"{name}_low", f"{name}_high"))
        else:
            columns[name] = value
    return columns
