"""The results of a run as the Markdown tables of docs/gpu.md."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from gpu.timing import GENERATE, LARGE_BATCH, TEMPERATURES

MISSING = "not yet measured"
_COUNTS = ("waits", "copies", "launches", "kernels", "busy_ms")
_GRAPHS = ("graphs", "memory of graphs, MB")
_PARTS = ("draft", "target", "judge", "commit", "other", "prefill")


def render(results: Mapping[str, Any]) -> str:
    """All tables; those without a measurement say so."""
    records: list[dict[str, Any]] = results.get("timing", [])
    parts = [
        f"## Measured on {results['machine']['card']}" if "machine" in results else "## Measured",
        "### Machine",
        _table(("measure", "value"), ((name, _shown(value)) for name, value in results.get("machine", {}).items())),
        "### Correctness",
        _table(
            ("check", "result"), ((name, "ok" if ok else "wrong") for name, ok in results.get("checks", {}).items())
        ),
        _table(("model", "texts equal", "ties", "different"), _counted(results.get("parity", {}))),
        _table(("dtype", "largest difference of tree logits"), _pairs(results.get("tree", {}), ".1e")),
        _table(
            ("scheme", "tree", "smallest p-value"),
            (
                (name, one["tree"], f"{min(one['p-values']):.4f}")
                for name, one in results.get("distribution", {}).items()
            ),
        ),
        _table(("given", "outcome"), _pairs(results.get("refusals", {}))),
        "### Seeds alone and in a batch of eight",
        _table(("models", "texts", "equal"), _counted(results.get("batch", {}))),
        "### Models of the timings",
        _table(("measure", "value"), _pairs(results.get("pair", {}), ".3f")),
    ]
    for batch, temperature in product((1, LARGE_BATCH), TEMPERATURES):
        parts += [f"### Speed at temperature {temperature:g}, batch {batch}", _speed(records, temperature, batch)]
    parts += [
        "### Host and card in a step",
        _step_counts(records),
        "### Milliseconds of a step by part",
        _parts(records),
    ]
    for kind in ("failed", "skipped"):
        if results.get(kind):
            parts += [f"### {kind.capitalize()}", _table(("what", "why"), results[kind].items())]
    return "\n\n".join(parts) + "\n"


def _speed(records: Iterable[dict[str, Any]], temperature: float, batch: int) -> str:
    chosen = [one for one in records if (one["temperature"], one["batch"]) == (temperature, batch)]
    baseline = next((one["tokens/s"] for one in chosen if one["system"] == GENERATE), None)
    header = ("system", "tokens/s", "× generate", "target calls", "tokens/call", "ms/step", "share of roofline")
    rows = [
        (
            one["system"],
            f"{one['tokens/s']:.1f}",
            f"{one['tokens/s'] / baseline:.2f}" if baseline else "–",
            str(one["target calls"]),
            f"{one['acceptance length']:.2f}",
            f"{one['ms per step']:.2f}",
            f"{one['share of roofline']:.0%}",
        )
        for one in chosen
    ]
    return _table(header, rows)


def _step_counts(records: Iterable[dict[str, Any]]) -> str:
    names = (name.replace("_ms", ", ms") for name in _COUNTS)
    header = ("system", "T", "batch", *names, "outside kernels", *_GRAPHS)
    rows = []
    for one in records:
        if "counts" not in one:
            continue
        counts = one["counts"]
        if isinstance(counts, str):
            cells = [counts] + ["–"] * len(_COUNTS)
        else:
            cells = [f"{counts[name]:.1f}" for name in _COUNTS]
            cells.append(f"{max(0.0, 1 - counts['busy_ms'] / one['ms per step']):.0%}")
        rows.append((*_case(one), *cells, *(_shown(one.get(name), ".0f") for name in _GRAPHS)))
    return _table(header, rows)


def _parts(records: Iterable[dict[str, Any]]) -> str:
    rows = [
        (*_case(one), *(f"{one['parts, ms'].get(name, 0.0):.2f}" for name in _PARTS))
        for one in records
        if "parts, ms" in one
    ]
    return _table(("system", "T", "batch", *_PARTS), rows)


def _case(record: Mapping[str, Any]) -> tuple[str, str, str]:
    return record["system"], f"{record['temperature']:g}", str(record["batch"])


def _counted(results: Mapping[str, Mapping[str, int]]) -> list[tuple[str, ...]]:
    return [(name, *map(str, counts.values())) for name, counts in results.items()]


def _pairs(results: Mapping[str, Any], format: str = "") -> list[tuple[str, str]]:
    return [(name, _shown(value, format)) for name, value in results.items()]


def _shown(value: Any, format: str = ".1f") -> str:
    return "not measured" if value is None else f"{value:{format}}" if isinstance(value, float) else str(value)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = lines or [[MISSING] + [""] * (len(header) - 1)]
    return "\n".join([_line(header), f"|{'---|' * len(header)}", *map(_line, lines)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
