"""The report: one self-contained HTML page. It loads and runs nothing, which its content security policy enforces."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mcsd.bench.charts import Figure
from mcsd.bench.experiment import MULTI, NAIVE, SINGLE
from mcsd.bench.figures import acceptance, attention, speedup, steps
from mcsd.bench.results import Results, SpeedRow, overall
from mcsd.bench.tables import Table, acceptance_table, attention_table, conclusions, left_out, speed_table
from mcsd.files import save_text

_CSS = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #566070; --line: #dfe3ea; --page: #fcfcfd; --box: #f3f5f8;
  --win: #1f5f9c }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ef; --soft: #a3adbd; --line: #2f3745; --page: #14181f;
  --box: #1c222c; --win: #7db8ea } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 84rem; padding: 2rem 1.5rem 5rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; -webkit-text-size-adjust: 100% }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.25rem; margin: 2.8rem 0 .4rem }
h3 { font-size: .95rem; margin: 0 0 .3rem }
p { margin: .4rem 0; max-width: 60rem }
.sub, .note { color: var(--soft) } .sub { margin: .2rem 0 1.2rem } .note { font-size: .9rem }
.conclusions { background: var(--box); border-left: 4px solid var(--win); border-radius: 4px; padding: .8rem 1.1rem;
  margin: 0; list-style: none; font-size: 1.05rem }
figure { margin: 1rem 0 } figcaption { color: var(--soft); font-size: .9rem; max-width: 60rem; margin-top: .4rem }
figure svg { display: block }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 0 0 .8rem; padding: 0; list-style: none;
  font-size: .9rem }
.keys i { display: inline-block; width: 1.3rem; margin-right: .4rem; vertical-align: .2em; border-top: 4px solid }
.panels { display: grid; gap: 1.4rem 2.4rem; grid-template-columns: minmax(0, 1fr) }
@media (min-width: 48rem) { .of2, .of3 { grid-template-columns: repeat(2, minmax(0, 1fr)) } }
@media (min-width: 72rem) { .of3 { grid-template-columns: repeat(3, minmax(0, 1fr)) } }
.wide { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: 4px;
  background: linear-gradient(to left, var(--page) 1rem, transparent) right / 2rem 100% local no-repeat,
    linear-gradient(to left, color-mix(in srgb, var(--ink) 25%, transparent), transparent) right / 1rem 100% no-repeat }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal }
th, td { padding: .35rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600; font-size: .8rem }
tr:last-child td { border-bottom: 0 }
.text { text-align: left } tr.best td { color: var(--win); font-weight: 600 }
details { margin: 1rem 0 } summary { cursor: pointer } pre { background: var(--box); padding: 1rem; overflow-x: auto;
  font-size: .8rem; border-radius: 4px; overflow-wrap: normal }
@media (max-width: 30rem) { body { padding: 1.2rem 1rem 3rem } th, td { padding: .35rem .55rem }
  td.text { white-space: normal; min-width: 9.5rem } }
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(results: Results, path: Path) -> None:
    """Write the page, and each figure as a file in ``figures`` beside it.

    Raises:
        OutputFailed: the folder cannot be written.
    """
    figures = draw(results)
    for name, figure in figures.items():
        save_text(path.parent / "figures" / f"{name}.svg", figure.file())
    save_text(path, page(results, figures))


def draw(results: Results) -> dict[str, Figure]:
    """The figures for which there are measurements, by name."""
    figures = {"speedup": speedup(results.speeds)}
    if any(row.step for row in results.speeds):
        figures["steps"] = steps(results.speeds)
    if results.acceptances:
        figures["acceptance"] = acceptance(results.acceptances)
    if results.attentions:
        figures["attention"] = attention(results.attentions)
    return figures


def page(results: Results, figures: Mapping[str, Figure]) -> str:
    """The report as HTML. All names from outside are escaped.

    Args:
        results: of the experiment.
        figures: from `draw`.
    """
    manifest = results.manifest
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>mcsd bench: {escape(_pair(manifest))}</title>\n<style>{_CSS}</style>\n</head>\n<body>",
            f'<h1>mcsd bench</h1>\n<p class="sub">{escape(_pair(manifest))}<br>{escape(_where(manifest))}</p>',
            '<ul class="conclusions">' + "".join(f"<li>{escape(line)}</li>" for line in conclusions(results)) + "</ul>",
            *(f'<p class="note">{escape(line)}.</p>' for line in left_out(results)),
            *_speed(results, figures),
            *_steps(figures),
            *_acceptance(results, figures),
            *_attention(results, figures),
            *_environment(manifest),
            "</body>\n</html>\n",
        ]
    )


def _pair(manifest: Mapping[str, Any]) -> str:
    models = manifest.get("weights", {})
    names = [f"{label} {models[label]}" for label in ("target", "draft", "tuned") if models.get(label)]
    return ", ".join(names) or "models given as objects"


def _where(manifest: Mapping[str, Any]) -> str:
    machine = manifest["machine"]
    place = machine.get("accelerator") or machine["processor"]
    return (
        f"{place}, {machine['threads']} threads, {machine['memory_gib']} GiB; torch {manifest['versions']['torch']}, "
        f"transformers {manifest['versions']['transformers']}"
    )


def _speed(results: Results, figures: Mapping[str, Figure]) -> list[str]:
    rows, best = overall(results.speeds), results.best()
    parts = [
        "<h2>Speed</h2>",
        _figure(
            figures["speedup"],
            "Tokens per second as a multiple of plain decoding in the same engine, over all prompts. All systems "
            "answered the same prompts in turns. Lines on the bars are 95 % confidence intervals of the multiple, from "
            "three prompts on. An arrow means that the interval goes on.",
        ),
        _table(speed_table(rows), [row in best for row in rows]),
        '<p class="note">× generate: tokens per second over those of <code>model.generate</code> of transformers. '
        "× plain: the same over plain decoding in this engine. Low and high: the 95 % confidence interval of × plain. "
        "Tokens/step: new tokens per forward of the target. Accepted: the share of the candidates that became text."
        "</p>",
        *_meanings(rows),
    ]
    return [
        *parts,
        "<details><summary>All prompt sets and columns</summary>",
        _table(speed_table(results.speeds, details=True)),
        '<p class="note">Low and high: the 95 % confidence interval of the column before them. Overhead: the share of '
        "the time outside prefill and the forwards of the models.</p></details>",
    ]


def _meanings(rows: Sequence[SpeedRow]) -> list[str]:
    """What the names of systems mean, where they do not say it."""
    said = {
        SINGLE: "one candidate per position (ordinary speculative sampling)",
        NAIVE: "naive verification, which accepts the target's sample if it is among the candidates",
    }
    words = list(dict.fromkeys(f"{row.system}: {said[row.role]}" for row in rows if row.role in said))
    if any(row.role == MULTI and row.temperature == 0 for row in rows):
        words.append("At temperature 0 all schemes accept the same candidates, so each tree runs once")
    return [f'<p class="note">{escape(". ".join(words))}.</p>'] if words else []


def _steps(figures: Mapping[str, Figure]) -> list[str]:
    return [
        "<h2>Time of a step</h2>",
        _figure(
            figures.get("steps"),
            "An average step of the engine, by part, and the tokens that it emits. draft: the draft model. target: the "
            "target's forward. judge: verification. commit: the caches keep the accepted path. Prefill is not part of "
            "a step. Systems outside the engine do not report their steps.",
        ),
    ]


def _acceptance(results: Results, figures: Mapping[str, Figure]) -> list[str]:
    return [
        "<h2>Acceptance</h2>",
        _figure(
            figures.get("acceptance"),
            "How often the target accepts one of the first k candidates, along texts that it generated. Bands are 95 % "
            "confidence intervals, from three texts on. All schemes verified the same positions, so differences "
            "between them are more certain than the bands.",
        ),
        _table(acceptance_table(overall(results.acceptances))),
        '<p class="note">mcss-wor draws candidates without replacement, mcss with replacement. naive accepts the '
        "target's sample if it is among the candidates. top-k: candidates that are not sampled, as at temperature 0."
        "</p>"
        if results.acceptances
        else "",
    ]


def _attention(results: Results, figures: Mapping[str, Figure]) -> list[str]:
    return [
        "<h2>Tree attention</h2>",
        _figure(
            figures.get("attention"),
            "One forward of the target over the same candidates: as one sequence with a tree mask, and as a batch with "
            "a sequence for each path from root to leaf. Copying the cache for the batch is not timed.",
        ),
        _table(attention_table(results.attentions)),
    ]


def _environment(manifest: Mapping[str, Any]) -> list[str]:
    command = manifest.get("command")
    return [
        "<h2>Reproduce</h2>",
        f"<pre>{escape(command)} --out FOLDER</pre>" if command else "",
        f"<details><summary>Manifest</summary><pre>{escape(json.dumps(manifest, indent=1))}</pre></details>",
    ]


def _figure(figure: Figure | None, caption: str) -> str:
    if figure is None:
        return '<p class="note">Not measured.</p>'
    keys = "".join(
        f'<li><i style="border-color:{key.colour};border-top-style:{"dashed" if key.dashed else "solid"}"></i>'
        f"{escape(key.name)}</li>"
        for key in figure.legend
    )
    panels = "".join(f"<div><h3>{escape(panel.title)}</h3>{panel.svg()}</div>" for panel in figure.panels)
    return (
        f'<figure><ul class="keys">{keys}</ul><div class="panels of{figure.columns}">{panels}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _table(table: Table, marked: Sequence[bool] = ()) -> str:
    """A table in a box that scrolls where the page is narrow."""
    if not table.rows:
        return ""
    words = [' class="text"' if column.is_text else "" for column in table.columns]
    lines = [
        "<tr>" + "".join(f"<th{c}>{escape(name)}</th>" for c, name in zip(words, table.names, strict=True)) + "</tr>"
    ]
    for i, row in enumerate(table.rows):
        cells = "".join(f"<td{c}>{escape(cell)}</td>" for c, cell in zip(words, row, strict=True))
        lines.append(f'<tr class="best">{cells}</tr>' if i < len(marked) and marked[i] else f"<tr>{cells}</tr>")
    return '<div class="wide" tabindex="0"><table>' + "\n".join(lines) + "</table></div>"
