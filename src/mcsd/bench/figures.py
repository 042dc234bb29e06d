"""The figures of a report: acceptance, speed, the time of a step, tree attention."""

from collections.abc import Sequence

from mcsd.bench.charts import Bar, Curve, Figure, Key, Panel, bars, limits_of, lines, short
from mcsd.bench.experiment import MULTI, PLAIN, TUNED
from mcsd.bench.results import ALL_PROMPTS, STEP_PARTS, AcceptanceRow, AttentionRow, SpeedRow, overall

_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY, _YELLOW = "#3b82c4", "#e07b39", "#3fa06b", "#b65fb0", "#8a8f98", "#c9a227"
_SCHEMES = {"mcss-wor": _BLUE, "mcss": _ORANGE, "naive": _GREEN, "top-k": _YELLOW}
_PARTS = dict(zip(STEP_PARTS, (_ORANGE, _BLUE, _GREEN, _PURPLE, _GREY), strict=True))
_OURS, _BASELINE, _PLAIN = Key("mcsd", _BLUE), Key("baseline", _ORANGE), Key("plain decoding", _GREY)

_MOST = 2.5
"""The axis of the speed-ups ends at this many times the largest one, whatever the intervals."""


def speedup(rows: Sequence[SpeedRow]) -> Figure:
    """Speed-up over plain decoding and tokens/s: a panel a temperature and batch size, a bar a system."""
    rows = overall(rows)
    largest = max(row.speedup.value for row in rows)
    highest = max(row.speedup.value if row.speedup.high is None else row.speedup.high for row in rows)
    panels = [
        bars(title, [_speed_bar(row) for row in shown], "times plain decoding", min(highest, _MOST * largest), mark=1.0)
        for title, shown in _conditions(rows)
    ]
    used = {_speed_key(row) for row in rows}
    return Figure(tuple(panels), _side_by_side(panels), tuple(key for key in (_OURS, _BASELINE, _PLAIN) if key in used))


def _speed_bar(row: SpeedRow) -> Bar:
    value = row.speedup
    interval = None if value.low is None or value.high is None else (value.low, value.high)
    note = f"{row.tokens_per_second.value:.1f} tokens/s"
    return Bar(short(row.system), note, [[(value.value, _speed_key(row).colour)]], interval)


def _speed_key(row: SpeedRow) -> Key:
    return _PLAIN if row.role == PLAIN else _OURS if row.role == MULTI else _BASELINE


def acceptance(rows: Sequence[AcceptanceRow]) -> Figure:
    """Acceptance against k: a panel a temperature and prompt set, a line a scheme and draft."""
    sets = list(dict.fromkeys(row.prompts for row in rows if row.prompts != ALL_PROMPTS))
    curves = {
        (temperature, prompts): [
            _curve(row) for row in rows if (row.temperature, row.prompts) == (temperature, prompts)
        ]
        for temperature in sorted({row.temperature for row in rows})
        for prompts in sets
    }
    limits = limits_of([curve for some in curves.values() for curve in some])
    panels = [
        lines(f"temperature {temperature:g}, {short(prompts)}", some, "candidates k", limits)
        for (temperature, prompts), some in curves.items()
    ]
    keys = dict.fromkeys(curve.key for some in curves.values() for curve in some)
    return Figure(tuple(panels), min(len(sets), 3), tuple(keys))


def _curve(row: AcceptanceRow) -> Curve:
    tuned = row.draft == TUNED
    band = [
        (one.value, one.value) if one.low is None or one.high is None else (one.low, one.high) for one in row.within
    ]
    key = Key(row.scheme + (" tuned" if tuned else ""), _SCHEMES[row.scheme], tuned)
    return Curve(key, [one.value for one in row.within], band)


def steps(rows: Sequence[SpeedRow]) -> Figure:
    """Where an average step's time goes: stacked bars, a panel a temperature and batch size."""
    rows = [row for row in overall(rows) if row.step]
    maximum = max(sum(row.step.values()) for row in rows)
    panels = [
        bars(title, [_step_bar(row) for row in shown], "milliseconds per step", maximum)
        for title, shown in _conditions(rows)
    ]
    return Figure(tuple(panels), _side_by_side(panels), tuple(Key(part, colour) for part, colour in _PARTS.items()))


def _step_bar(row: SpeedRow) -> Bar:
    tokens = row.block_efficiency
    note = "" if tokens is None else f"{tokens.value:.2f} tokens/step"
    return Bar(short(row.system), note, [[(row.step[part], colour) for part, colour in _PARTS.items()]])


def attention(rows: Sequence[AttentionRow]) -> Figure:
    """One forward of the target: as a tree, and as a batch of the tree's paths."""
    shown = [
        Bar(short(row.tree), f"tree {row.times.value:.2f}× as fast", [[(row.tree_ms, _BLUE)], [(row.batch_ms, _GREY)]])
        for row in rows
    ]
    maximum = max(max(row.tree_ms, row.batch_ms) for row in rows)
    panel = bars("one forward of the target", shown, "milliseconds", maximum)
    return Figure((panel,), 1, (Key("tree mask", _BLUE), Key("batch of paths", _GREY)))


def _conditions(rows: Sequence[SpeedRow]) -> list[tuple[str, list[SpeedRow]]]:
    """A title and its rows for each temperature and batch size."""
    several = len({row.batch for row in rows}) > 1
    return [
        (
            f"temperature {temperature:g}" + (f", batch {batch}" if several else ""),
            [row for row in rows if (row.temperature, row.batch) == (temperature, batch)],
        )
        for temperature, batch in sorted({(row.temperature, row.batch) for row in rows})
    ]


def _side_by_side(panels: Sequence[Panel]) -> int:
    return 3 if len(panels) % 3 == 0 else min(len(panels), 2)
