"""Results as text: the tables that terminals and reports show. A cell holds one number."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mcsd.bench.experiment import GENERATE, PLAIN, TUNED
from mcsd.bench.intervals import Interval
from mcsd.bench.results import AcceptanceRow, AttentionRow, Results, SpeedRow

NONE = "-"
"""A cell without a number."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its heading.
        cell: from a row of results to its text.
        is_text: left-aligned; numbers are right-aligned.
    """

    name: str
    cell: Callable[[Any], str]
    is_text: bool = False


@dataclass(frozen=True)
class Table:
    """Columns, and the cells of each row."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The headings."""
        return tuple(column.name for column in self.columns)


def conclusions(results: Results) -> list[str]:
    """The fastest system, in a line for each temperature and batch size."""
    several = len({row.batch for row in results.speeds}) > 1
    lines = []
    for row in results.best():
        where = f"temperature {row.temperature:g}" + (f", batch {row.batch}" if several else "")
        parts = [f"{where}: fastest is {row.system}", f"{row.tokens_per_second.value:.1f} tokens/s"]
        if row.speedup_generate is not None and row.role != GENERATE:
            parts.append(f"{row.speedup_generate.value:.2f}× generate")
        if row.role != PLAIN:
            parts.append(f"{row.speedup.value:.2f}× plain decoding")
        lines.append(", ".join(parts))
        if row.role != PLAIN and (row.speedup.low is None or row.speedup.low <= 1):
            lines.append(f"{where}: more prompts are needed to tell it from plain decoding")
    return lines


def left_out(results: Results) -> list[str]:
    """A line for each system that does not run."""
    return [f"{name} is left out: {reason}" for name, reason in results.left_out.items()]


def speed_table(rows: Sequence[SpeedRow], details: bool = False) -> Table:
    """One row a system, prompt set and condition: speed first, then acceptance.

    Args:
        rows: of the table. Columns that would say the same in each row are left out.
        details: whether every figure has its confidence interval, and rows the counts behind them.
    """
    speeds = [*_intervals("tokens/s", lambda row: row.tokens_per_second, 1, details)]
    if any(row.speedup_generate is not None for row in rows):
        speeds += _intervals("× generate", lambda row: row.speedup_generate, 2, details)
    speeds += _intervals("× plain", lambda row: row.speedup, 2, details or any(row.speedup.low for row in rows))
    columns = [
        *([Column("prompts", lambda row: row.prompts, True)] if len({row.prompts for row in rows}) > 1 else ()),
        Column("temp", lambda row: f"{row.temperature:g}"),
        *([Column("batch", lambda row: str(row.batch))] if len({row.batch for row in rows}) > 1 else ()),
        Column("system", lambda row: row.system, True),
        *speeds,
        *_intervals("tokens/step", lambda row: row.block_efficiency, 2, details),
        Column("accepted", lambda row: _percentage(row.draft_acceptance_rate)),
    ]
    if details:
        columns += [
            Column("overhead", lambda row: _percentage(row.overhead)),
            Column("candidates/step", lambda row: NONE if row.candidates is None else f"{row.candidates:.1f}"),
            Column("texts", lambda row: str(row.requests)),
            Column("tokens", lambda row: str(row.new_tokens)),
        ]
    return _table(columns, rows)


def acceptance_table(rows: Sequence[AcceptanceRow]) -> Table:
    """One row a draft, scheme, prompt set and temperature; one column a number of candidates."""
    widths = len(rows[0].within) if rows else 0
    columns = [
        *([Column("prompts", lambda row: row.prompts, True)] if len({row.prompts for row in rows}) > 1 else ()),
        Column("temp", lambda row: f"{row.temperature:g}"),
        Column("scheme", lambda row: row.scheme + (" tuned" if row.draft == TUNED else ""), True),
        Column("texts", lambda row: str(row.texts)),
        *(Column(f"k={k}", _share(k)) for k in range(1, 1 + widths)),
    ]
    return _table(columns, rows)


def _share(k: int) -> Callable[[Any], str]:
    return lambda row: f"{row.within[k - 1].value:.3f}"


def attention_table(rows: Sequence[AttentionRow]) -> Table:
    """One row a tree."""
    columns = [
        Column("tree", lambda row: row.tree, True),
        Column("candidates", lambda row: str(row.nodes)),
        Column("paths", lambda row: str(row.paths)),
        Column("tree ms", lambda row: f"{row.tree_ms:.1f}"),
        Column("batch ms", lambda row: f"{row.batch_ms:.1f}"),
        *_intervals("× batch", lambda row: row.times, 2, any(row.times.low for row in rows)),
    ]
    return _table(columns, rows)


def _table(columns: Sequence[Column], rows: Sequence[Any]) -> Table:
    return Table(tuple(columns), tuple(tuple(column.cell(row) for column in columns) for row in rows))


def _intervals(name: str, figure: Callable[[Any], Interval | None], digits: int, with_ends: bool) -> list[Column]:
    """A column with a figure, and two with the ends of its confidence interval."""

    def cell(part: Callable[[Interval], float | None]) -> Callable[[Any], str]:
        def text(row: Any) -> str:
            interval = figure(row)
            value = None if interval is None else part(interval)
            return NONE if value is None else f"{value:.{digits}f}"

        return text

    ends = [Column("low", cell(lambda interval: interval.low)), Column("high", cell(lambda interval: interval.high))]
    return [Column(name, cell(lambda interval: interval.value)), *(ends if with_ends else ())]


def _percentage(value: float | None) -> str:
    return NONE if value is None else f"{value:.1%}"
