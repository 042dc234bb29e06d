"""Results as text: the tables that terminals and reports show."""

from collections.abc import Sequence

from mcsd.bench.experiment import PLAIN, TUNED
from mcsd.bench.intervals import Interval
from mcsd.bench.results import AcceptanceRow, AttentionRow, Results, SpeedRow

Table = list[tuple[str, ...]]
"""The header, then the rows."""


def conclusions(results: Results) -> list[str]:
    """The fastest system, in a line for each temperature and batch size."""
    several = len({row.batch for row in results.speeds}) > 1
    lines = []
    for row in results.best():
        where = f"temperature {row.temperature:g}" + (f", batch {row.batch}" if several else "")
        if row.role == PLAIN:
            lines.append(f"{where}: nothing beats plain decoding")
        else:
            lines.append(
                f"{where}: fastest is {row.system}, {_interval(row.speedup)} times plain decoding{_reservation(row)}"
            )
    return lines


def _reservation(row: SpeedRow) -> str:
    if row.speedup.low is None:
        return ", on too few prompts to tell"
    return ", too close to tell them apart" if row.speedup.low <= 1 else ""


def speed_table(rows: Sequence[SpeedRow]) -> Table:
    """One row a system, prompt set and condition."""
    head = (
        *("PROMPTS", "T", "BATCH", "SYSTEM", "ROLE", "TEXTS", "TOKENS", "TOKENS/S", "SPEED-UP", "95 %"),
        *("BLOCK EFFICIENCY", "95 %", "LENGTH", "CANDIDATES", "ACCEPTED", "OVERHEAD"),
    )
    return [head, *map(_speed, rows)]


def _speed(row: SpeedRow) -> tuple[str, ...]:
    block = row.block_efficiency
    return (
        *(row.prompts, f"{row.temperature:g}", str(row.batch), row.system, row.role),
        *(str(row.requests), str(row.new_tokens), f"{row.tokens_per_second.value:.2f}"),
        *(f"{row.speedup.value:.2f}", _range(row.speedup)),
        *(("-", "-") if block is None else (f"{block.value:.2f}", _range(block))),
        _number(row.mean_acceptance_length),
        "-" if row.candidates is None else f"{row.candidates:.1f}",
        _percentage(row.draft_acceptance_rate),
        _percentage(row.overhead),
    )


def acceptance_table(rows: Sequence[AcceptanceRow]) -> Table:
    """One row a draft, scheme, prompt set and temperature; one column a number of candidates."""
    widths = len(rows[0].within) if rows else 0
    head = ("PROMPTS", "T", "DRAFT", "SCHEME", "TEXTS", *(f"K={k}" for k in range(1, widths + 1)))
    return [
        head,
        *(
            (
                *(row.prompts, f"{row.temperature:g}", "tuned" if row.draft == TUNED else "draft"),
                *(row.scheme, str(row.texts)),
                *(f"{interval.value:.3f}" for interval in row.within),
            )
            for row in rows
        ),
    ]


def attention_table(rows: Sequence[AttentionRow]) -> Table:
    """One row a tree."""
    head = ("TREE", "CANDIDATES", "PATHS", "TREE MS", "BATCH MS", "TIMES", "95 %")
    return [
        head,
        *(
            (
                *(row.tree, str(row.nodes), str(row.paths), f"{row.tree_ms:.1f}", f"{row.batch_ms:.1f}"),
                *(f"{row.times.value:.2f}", _range(row.times)),
            )
            for row in rows
        ),
    ]


def _interval(interval: Interval) -> str:
    return f"{interval.value:.2f}" + ("" if interval.low is None else f" [{_range(interval)}]")


def _range(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return "-"
    return f"{interval.low:.2f}, {interval.high:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percentage(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
