"""HTML for notebooks, readable on light and dark pages. Everything is escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby

from mcsd.tree_picture import LEGEND, MARKS, TreeNode

MAX_TOKENS = 4096
"""Tokens of a text that are shown at most."""

_ACCEPTED = "background:rgba(46,160,67,.28);border-radius:2px"
_NOTE = "opacity:.7;font-size:90%;margin-top:.4em"

_GREEN = "#2ea043"
_BOXES = {
    "root": "",
    "accepted": f'fill="{_GREEN}" fill-opacity=".25" stroke="{_GREEN}"',
    "not accepted": 'fill="none" stroke="currentColor" stroke-dasharray="3"',
    "from the target": 'fill="none" stroke="currentColor" stroke-width="2"',
}
_WIDTH, _HEIGHT, _GAP, _ROW = 150, 36, 40, 46
"""Of a box, between columns, and from row to row, in pixels."""
_LABEL = 16
"""Characters of a label that fit into a box."""


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


def tree_html(nodes: Sequence[TreeNode], note: str) -> str:
    """A candidate tree from left to right as inline SVG, in the colors of the page.

    Args:
        nodes: from the root on, parents before children.
        note: stands below, before the legend.
    """
    places = _places(nodes)
    width = max(x for x, _ in places.values()) + _WIDTH + 2
    height = max(y for _, y in places.values()) + _ROW
    edges = [_edge(child, places[node], places[child]) for node in nodes for child in node.children]
    boxes = [_box(node, *places[node]) for node in nodes[1:]]
    x, y = places[nodes[0]]
    root = f'<circle cx="{x + _WIDTH - 6}" cy="{y + _HEIGHT / 2}" r="5"/>'
    return (
        f'<div style="overflow-x:auto"><svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width}"'
        f' height="{height}" viewBox="0 0 {width} {height}" fill="currentColor" font-family="monospace" font-size="12">'
        f"<title>{escape(note)}</title>{''.join(edges)}{root}{''.join(boxes)}</svg></div>"
        f'<div style="{_NOTE}">{escape(note)}<br>{escape(LEGEND)}</div>'
    )


def _places(nodes: Sequence[TreeNode]) -> dict[TreeNode, tuple[float, float]]:
    """Left and top of each node: leaves have a row each, and parents stand in the middle of their children."""
    columns, rows = {nodes[0]: 0}, dict[TreeNode, float]()
    for node in nodes:
        columns |= dict.fromkeys(node.children, columns[node] + 1)
    order, pending = [], [nodes[0]]
    while pending:
        order.append(pending.pop())
        pending += reversed(order[-1].children)
    rows |= {node: row for row, node in enumerate(node for node in order if not node.children)}
    for node in reversed(order):
        if node.children:
            rows[node] = (rows[node.children[0]] + rows[node.children[-1]]) / 2
    # The root is a dot at the right of its column.
    left = _GAP - 12 - _WIDTH
    return {node: (left + columns[node] * (_WIDTH + _GAP), 1 + rows[node] * _ROW) for node in order}


def _edge(child: TreeNode, start: tuple[float, float], end: tuple[float, float]) -> str:
    x, y, top = start[0] + _WIDTH, start[1] + _HEIGHT / 2, end[1] + _HEIGHT / 2
    middle = (x + end[0]) / 2
    stroke = f'stroke="{_GREEN}" stroke-width="2.5"' if child.kind == "accepted" else 'stroke="currentColor"'
    opacity = ' opacity=".5"' if child.kind == "not accepted" else ""
    return f'<path d="M{x} {y}C{middle} {y} {middle} {top} {end[0]} {top}" fill="none" {stroke}{opacity}/>'


def _box(node: TreeNode, x: float, y: float) -> str:
    from rich.cells import cell_len, set_cell_size

    short = node.label if cell_len(node.label) <= _LABEL else f"{set_cell_size(node.label, _LABEL - 1)}…"
    opacity = ' opacity=".6"' if node.kind == "not accepted" else ""
    return (
        f"<g{opacity}><title>{escape(node.label)}</title>"
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="5" {_BOXES[node.kind]}/>'
        f'<text x="{x + 8}" y="{y + 15}" xml:space="preserve">{MARKS[node.kind]} {escape(short)}</text>'
        f'<text x="{x + 8}" y="{y + 30}" xml:space="preserve">{node.probabilities}</text></g>'
    )
