"""Draw the pictures of the README as SVG files: a terminal with a run of `mcsd generate`, and a bar chart of speed.

    python benchmarks/pictures.py

reads ``terminal.json`` and ``speed.json`` in docs/pictures and writes a light and a dark SVG of each beside them.

    python benchmarks/pictures.py --record

first runs the command in ``terminal.json`` again and stores what it prints; ``--record COMMAND`` runs another command.
A command begins with ``mcsd`` and contains ``--color``.

``speed.json`` holds one measured comparison: two to six bars in tokens per second, the first one the baseline. Enter
the values of a run of `mcsd bench` by hand, with its models, settings, machine and command.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"

MONOSPACE = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"
SANS_SERIF = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, 'Liberation Sans', sans-serif"

Style = Literal["accepted", "target", "plain"]
Part = tuple[Style, str]
"""Text in one style."""


@dataclass(frozen=True)
class Theme:
    """Colors. Text has a contrast of at least 4.5 to its background, bars of at least 3 (WCAG AA).

    Attributes:
        name: the end of the file name.
        background, border, title_bar, button: of the window or the chart.
        text, muted: of text, and of less important text.
        accepted: text of accepted candidates: a bluish green, which differs in brightness from ``text`` too.
        mcsd, baseline: bars.
    """

    name: str
    background: str
    border: str
    title_bar: str
    button: str
    text: str
    muted: str
    accepted: str
    mcsd: str
    baseline: str


LIGHT = Theme(
    name="light",
    background="#ffffff",
    border="#d0d7de",
    title_bar="#f6f8fa",
    button="#afb8c1",
    text="#1f2328",
    muted="#59636e",
    accepted="#007a5a",
    mcsd="#0969da",
    baseline="#7d8590",
)
DARK = Theme(
    name="dark",
    background="#0d1117",
    border="#3d444d",
    title_bar="#161b22",
    button="#484f58",
    text="#f0f6fc",
    muted="#9198a1",
    accepted="#3fd0a4",
    mcsd="#4493f8",
    baseline="#7d8590",
)


@dataclass(frozen=True)
class TerminalRun:
    """A command and what it printed.

    Attributes:
        command: as typed.
        machine: where it ran.
        stdout, stderr: its output, by line, with the escape sequences of colors.
    """

    command: str
    machine: str
    stdout: tuple[str, ...]
    stderr: tuple[str, ...]


@dataclass(frozen=True)
class Bar:
    """One bar: a program, its tokens per second, and whether it is mcsd."""

    name: str
    tokens_per_second: float
    mcsd: bool


@dataclass(frozen=True)
class Speed:
    """One measured comparison.

    Attributes:
        models, settings, machine: what was measured, how and where. They are printed below the bars.
        command: the command that measured it.
        bars: two to six; the first one is the baseline.
    """

    models: str
    settings: str
    machine: str
    command: str
    bars: tuple[Bar, ...]

    def __post_init__(self) -> None:
        if not 2 <= len(self.bars) <= 6 or any(bar.tokens_per_second <= 0 for bar in self.bars):
            raise ValueError("give two to six bars with positive tokens_per_second")


def read_terminal_run(path: Path) -> TerminalRun:
    """Read a recorded run."""
    values = json.loads(path.read_text(encoding="utf-8"))
    return TerminalRun(values["command"], values["machine"], tuple(values["stdout"]), tuple(values["stderr"]))


def read_speed(path: Path) -> Speed:
    """Read a measured comparison."""
    values = json.loads(path.read_text(encoding="utf-8"))
    return Speed(**values | {"bars": tuple(Bar(**bar) for bar in values["bars"])})


def record(command: str) -> TerminalRun:
    """Run a command that begins with ``mcsd`` and keep what it prints.

    Raises:
        ValueError: it is not a colored mcsd command, or it failed.
    """
    from mcsd.system import processor

    program, *arguments = shlex.split(command)
    if program != "mcsd" or "--color" not in arguments:
        raise ValueError(f"{command!r}: the command must begin with mcsd and contain --color")
    done = subprocess.run(
        [sys.executable, "-m", "mcsd", *arguments], stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        raise ValueError(f"{command} failed: {done.stderr}")
    return TerminalRun(
        command,
        f"{os.cpu_count()} cores of an {processor()[0]}",
        tuple(done.stdout.splitlines(keepends=True)),
        tuple(done.stderr.splitlines(keepends=True)),
    )


def draw_terminal(run: TerminalRun, theme: Theme) -> str:
    """The picture of a terminal window."""
    columns, size, character, line_height, margin, title_bar = 56, 15.0, 9.03, 22.0, 18.0, 34.0
    summary = run.stderr[-1]
    printed = "".join((*run.stderr[:-1], "\n", *run.stdout, "\n", summary)).replace("\t", "    ")
    lines = [*wrap([("plain", f"$ {run.command}")], columns), *wrap(parts(printed), columns)]
    width = round(columns * character + 2 * margin)
    height = round(title_bar + len(lines) * line_height + 2 * margin)
    body = [
        f'<path d="M1 {title_bar:g}V10a9 9 0 0 1 9-9H{width - 10}a9 9 0 0 1 9 9v{title_bar - 10:g}z" '
        f'fill="{theme.title_bar}"/>',
        f'<path d="M1 {title_bar:g}h{width - 2}" stroke="{theme.border}"/>',
        *(f'<circle cx="{20 + 20 * i}" cy="{title_bar / 2:g}" r="6" fill="{theme.button}"/>' for i in range(3)),
    ]
    for i, line in enumerate(lines):
        y = title_bar + margin + (i + 0.7) * line_height
        spans = "".join(_span(style, text, theme) for style, text in line)
        if spans:
            body.append(f'<text x="{margin:g}" y="{y:g}" xml:space="preserve">{spans}</text>')
    description = (
        f"The command {run.command} with its output. Candidates of the draft that were accepted are green, tokens "
        f"from the target are bold. Last line: {plain_text(summary).strip()}. Recorded on {run.machine}."
    )
    title = "mcsd generate in a terminal"
    return _svg(width, height, title, description, theme, f'font-family="{MONOSPACE}" font-size="{size:g}"', body)


def draw_speed(speed: Speed, theme: Theme) -> str:
    """The bar chart of tokens per second."""
    width, margin, row, bar_height, values_width, characters = 520, 20, 56, 22, 110, 64
    longest = max(bar.tokens_per_second for bar in speed.bars)
    baseline = speed.bars[0]
    body = [f'<text x="{margin}" y="36" font-size="19" font-weight="600" fill="{theme.text}">Tokens per second</text>']
    top = 54
    for i, bar in enumerate(speed.bars):
        y = top + i * row
        length = max((width - 2 * margin - values_width) * bar.tokens_per_second / longest, 2)
        weight = ' font-weight="600"' if bar.mcsd else ""
        ratio = _rounded(bar.tokens_per_second / baseline.tokens_per_second)
        values = (
            f'<tspan font-weight="600" fill="{theme.text}">{_rounded(bar.tokens_per_second)}</tspan>'
            f'<tspan dx="10" fill="{theme.muted}">{ratio}×</tspan>'
        )
        body += [
            f'<text x="{margin}" y="{y + 16}"{weight} fill="{theme.text}">{escape(bar.name)}</text>',
            f'<rect x="{margin}" y="{y + 24}" width="{length:.1f}" height="{bar_height}" rx="3" '
            f'fill="{theme.mcsd if bar.mcsd else theme.baseline}"/>',
            f'<text x="{margin + length + 10:.1f}" y="{y + 41}" font-size="17">{values}</text>',
        ]
    notes = [speed.models, speed.settings, speed.machine, f"× relative to {baseline.name}"]
    lines = [line for note in notes for line in wrap([("plain", note)], characters)]
    y = top + len(speed.bars) * row + 24
    for i, line in enumerate(lines):
        text = escape("".join(text for _, text in line))
        body.append(f'<text x="{margin}" y="{y + 20 * i}" font-size="14" fill="{theme.muted}">{text}</text>')
    list_of_bars = ", ".join(f"{bar.name} {_rounded(bar.tokens_per_second)}" for bar in speed.bars)
    description = f"Tokens per second: {list_of_bars}. {speed.models}. {speed.settings}. {speed.machine}."
    fonts = f'font-family="{SANS_SERIF}" font-size="16"'
    return _svg(width, y + 20 * len(lines), "Tokens per second, compared", description, theme, fonts, body)


def parts(text: str) -> list[Part]:
    """Split a text with color escape sequences: green is "accepted", bold is "target"."""
    found: list[Part] = []
    style: Style = "plain"
    for i, piece in enumerate(re.split(r"\x1b\[([\d;]*)m", text)):
        if i % 2:
            codes = piece.split(";")
            style = "accepted" if "32" in codes else "target" if "1" in codes else "plain"
        elif piece:
            found.append((style, piece))
    return found


def plain_text(text: str) -> str:
    """A text without color escape sequences."""
    return "".join(piece for _, piece in parts(text))


def wrap(text: Iterable[Part], columns: int) -> list[list[Part]]:
    """Break a text into lines at its newlines and, where a line is too long, at spaces.

    A word that is longer than a line is cut.
    """
    lines: list[list[Part]] = []
    line: list[Part] = []
    for character in [(style, character) for style, part in text for character in part] + [("plain", "\n")]:
        if character[1] == "\n":
            lines.append(_merged(line))
            line = []
            continue
        line.append(character)
        if len(line) > columns:
            blanks = [i for i, (_, c) in enumerate(line) if c == " " and any(c != " " for _, c in line[:i])]
            cut = blanks[-1] if blanks else columns
            lines.append(_merged(line[:cut]))
            line = line[cut + bool(blanks) :]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _merged(characters: Sequence[Part]) -> list[Part]:
    """Characters as parts, without spaces at the end."""
    end = len(characters)
    while end and characters[end - 1][1] == " ":
        end -= 1
    groups = groupby(characters[:end], key=lambda character: character[0])
    return [(style, "".join(c for _, c in group)) for style, group in groups]


def _span(style: Style, text: str, theme: Theme) -> str:
    color = theme.accepted if style == "accepted" else theme.text
    weight = ' font-weight="700"' if style == "target" else ""
    return f'<tspan fill="{color}"{weight}>{escape(text)}</tspan>'


def _svg(
    width: int, height: int, title: str, description: str, theme: Theme, attributes: str, body: Iterable[str]
) -> str:
    """A picture with a background, a border, a title and a description."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-labelledby="title description" {attributes}>',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="description">{escape(description)}</desc>',
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="9.5" fill="{theme.background}" '
        f'stroke="{theme.border}"/>',
        *body,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _rounded(value: float) -> str:
    """Two or three digits that count."""
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def pictures(folder: Path) -> Iterator[tuple[str, str]]:
    """The names and contents of all pictures of the records in a folder."""
    run, speed = read_terminal_run(folder / "terminal.json"), read_speed(folder / "speed.json")
    for theme in (LIGHT, DARK):
        yield f"terminal-{theme.name}.svg", draw_terminal(run, theme)
        yield f"speed-{theme.name}.svg", draw_speed(speed, theme)


def main() -> None:
    """Record a run if asked to, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", nargs="?", const="", metavar="COMMAND", help="run the command in terminal.json")
    command = parser.parse_args().record
    if command is not None:
        path = FOLDER / "terminal.json"
        run = record(command or read_terminal_run(path).command)
        path.write_text(json.dumps(asdict(run), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, text in pictures(FOLDER):
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"docs/pictures/{name}")


if __name__ == "__main__":
    main()
