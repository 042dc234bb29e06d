"""The report: one self-contained HTML page. It loads and runs nothing, which its content security policy enforces."""

import json
from collections.abc import Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from mcsd.bench.figures import acceptance, attention, speedup, steps, svg
from mcsd.bench.results import Results
from mcsd.bench.tables import Table, acceptance_table, attention_table, conclusions, speed_table
from mcsd.files import save_text

_CSS = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5d6675; --line: #dfe3ea; --page: #fcfcfd; --box: #f3f5f8;
  --win: #2a6ca8 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ef; --soft: #98a2b3; --line: #2f3745; --page: #14181f;
  --box: #1c222c; --win: #7db8ea } }
body { margin: 0 auto; max-width: 74rem; padding: 2rem 1.5rem 5rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.2rem; margin: 2.8rem 0 .4rem }
p { margin: .4rem 0; max-width: 52rem }
.sub, figcaption, .note { color: var(--soft) } .sub { margin: .2rem 0 1.2rem }
.conclusions { background: var(--box); border-left: 4px solid var(--win); border-radius: 4px; padding: .8rem 1.1rem;
  margin: 0; list-style: none; font-size: 1.1rem }
figure { margin: 1rem 0; color: var(--ink) } figure svg { display: block; max-width: 100%; height: auto }
figcaption { font-size: .9rem; max-width: 52rem; margin-top: .4rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600; font-size: .75rem; vertical-align: bottom; background: var(--box) }
td.text, th.text { text-align: left } tr.best td { color: var(--win); font-weight: 600 }
details { margin: 1rem 0 } summary { cursor: pointer } pre { background: var(--box); padding: 1rem; overflow-x: auto;
  font-size: .8rem; border-radius: 4px }
"""

_TEXT_COLUMNS = {"PROMPTS", "SYSTEM", "ROLE", "DRAFT", "SCHEME", "TREE"}
"""Left-aligned columns."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(results: Results, path: Path) -> None:
    """Write the page, and each figure as a file in ``figures`` beside it.

    Raises:
        OutputFailed: the folder cannot be written.
    """
    figures = draw(results)
    for name, text in figures.items():
        save_text(path.parent / "figures" / f"{name}.svg", text.replace("currentColor", "#555555"))
    save_text(path, page(results, figures))


def draw(results: Results) -> dict[str, str]:
    """The figures for which there are measurements, as SVG, by name."""
    makers = {
        "acceptance": partial(acceptance, results.acceptances) if results.acceptances else None,
        "speedup": partial(speedup, results.speeds),
        "steps": partial(steps, results.speeds),
        "attention": partial(attention, results.attentions) if results.attentions else None,
    }
    return {name: svg(name, make) for name, make in makers.items() if make}


def page(results: Results, figures: Mapping[str, str]) -> str:
    """The report as HTML. All names from outside are escaped.

    Args:
        results: of the experiment.
        figures: from `draw`.
    """
    manifest = results.manifest
    best = results.best()
    marked = {i for i, row in enumerate(results.speeds) if row in best}
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>mcsd bench: {escape(_pair(manifest))}</title>\n<style>{_CSS}</style>\n</head>\n<body>",
            f'<h1>mcsd bench</h1>\n<p class="sub">{escape(_pair(manifest))}<br>{escape(_where(manifest))}</p>',
            '<ul class="conclusions">' + "".join(f"<li>{escape(line)}</li>" for line in conclusions(results)) + "</ul>",
            *_sections(results, figures, marked),
            "<h2>Environment</h2>",
            f"<details><summary>Manifest</summary><pre>{escape(json.dumps(manifest, indent=1))}</pre></details>",
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


def _sections(results: Results, figures: Mapping[str, str], marked: set[int]) -> list[str]:
    """Figures with captions, and tables."""
    return [
        "<h2>Acceptance against the number of candidates</h2>",
        _figure(
            figures.get("acceptance"),
            "How often the target accepts one of the first k candidates, at the positions of text that it generated. "
            "At temperature 0 candidates are the draft's most probable tokens, whatever the scheme. Bands are 95 % "
            "confidence intervals over texts. All schemes verified the same positions, so their differences are more "
            "certain than the bands.",
        ),
        _table(acceptance_table(results.acceptances)),
        "<h2>Speed-up</h2>",
        _figure(
            figures.get("speedup"),
            "New tokens a second, prefill included, over those of plain decoding in the same engine, all prompts "
            "together; of repeated requests each prompt's median counts. Plain decoding is grey, the other baselines "
            "are orange. Systems are interleaved request by request. Lines are 95 % confidence intervals by the "
            "jackknife: prompts are left out of both sides of the ratio.",
        ),
        "<h2>Where a step's time goes</h2>",
        _figure(
            figures.get("steps"),
            "An average step of the engine, and the tokens that it emits. Prefill is not part of a step. Systems "
            "outside the engine do not report their steps.",
        ),
        "<h2>Tree attention against a batch of paths</h2>",
        _figure(
            figures.get("attention"),
            "One forward of the target over the same candidates: as one sequence with a tree mask, and as a batch with "
            "a sequence for each path from root to leaf, whose caches hold the text each. Copying the caches is not "
            "timed.",
        ),
        _table(attention_table(results.attentions)),
        "<h2>All systems</h2>",
        '<p class="note">Tokens/s and speed-up: of repeated requests each prompt\'s median counts. Block efficiency: '
        "tokens a target call, all calls together. Length: the mean over texts of the same. Candidates: verified a "
        "call; accepted: the share of them that was emitted. Overhead: the share of the time outside prefill, drafting "
        "and the target's forwards.</p>",
        _table(speed_table(results.speeds), marked),
    ]


def _figure(drawing: str | None, caption: str) -> str:
    if drawing is None:
        return "<p class='note'>Not measured.</p>"
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(table: Table, marked: set[int] | None = None) -> str:
    head, *rows = table
    if not rows:
        return ""
    words = [' class="text"' if name in _TEXT_COLUMNS else "" for name in head]
    lines = [
        "<tr>" + "".join(f"<th{c}>{escape(n.capitalize())}</th>" for c, n in zip(words, head, strict=True)) + "</tr>"
    ]
    for i, row in enumerate(rows):
        cells = "".join(f"<td{c}>{escape(cell)}</td>" for c, cell in zip(words, row, strict=True))
        lines.append(f'<tr class="best">{cells}</tr>' if marked and i in marked else f"<tr>{cells}</tr>")
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"
