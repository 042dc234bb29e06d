"""HTML for notebooks, readable on light and dark pages. Everything is escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby

MAX_TOKENS = 4096
"""Tokens of a text that are shown at most."""

_ACCEPTED = "background:rgba(46,160,67,.28);border-radius:2px"
_NOTE = "opacity:.7;font-size:90%;margin-top:.4em"


def text_html(pieces: Sequence[str], drafted: Sequence[bool], note: str) -> str:
    """A text, with accepted candidates on a green ground.

    Args:
        pieces: of the text, by token.
        drafted: whether each is an accepted candidate.
        note: stands below.
    """
    spans = []
    for accepted, group in groupby(zip(pieces[:MAX_TOKENS], drafted, strict=False), key=lambda pair: pair[1]):
        text = escape("".join(piece for piece, _ in group))
        spans.append(f'<span style="{_ACCEPTED}">{text}</span>' if accepted and text else text)
    if len(pieces) > MAX_TOKENS:
        spans.append(f" … ({len(pieces) - MAX_TOKENS} more tokens)")
    legend = f'<span style="{_ACCEPTED}">drafted and accepted</span>'
    return (
        f'<div style="white-space:pre-wrap">{"".join(spans)}</div><div style="{_NOTE}">{escape(note)} · {legend}</div>'
    )


def table_html(title: str, rows: Mapping[str, object]) -> str:
    """A small table of names and values."""
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table><caption>{escape(title)}</caption>{cells}</table>"
