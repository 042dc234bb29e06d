"""``--show-tree``: the candidate tree of each step, as lines of text."""

import sys
from collections.abc import Iterable, Iterator

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from mcsd.results import Chunk
from mcsd.step_trace import StepTrace
from mcsd.tree_picture import LEGEND, MARKS, TreeNode, escape_invisible

_STYLES = {"accepted": "green", "not accepted": "dim", "from the target": "bold"}
_LABEL, _INDENT, _PROBABILITIES = 24, 4, 20
"""Columns: the widest label, the guides of a level, and mark, p and q."""
_BEFORE = 48
"""Characters of the text before a step that are shown with it."""


def show_steps(chunks: Iterable[Chunk], color: bool | None) -> Iterator[Chunk]:
    """Print a legend, then the candidate tree of each step and the end of the text, and yield the chunks.

    Args:
        chunks: with traces.
        color: None colors a terminal only. Without color there are no control codes.
    """
    system = {None: "auto", True: "standard", False: None}[color]
    console = Console(color_system=system, force_terminal=color, highlight=False)  # type: ignore[arg-type]
    _write(console, Text(LEGEND))
    before = ""
    for step, chunk in enumerate(chunks, start=1):
        if chunk.trace is not None:
            title = f"step {step} · {chunk.trace.summary}"
            if len(chunk.token_ids) < chunk.trace.acceptance_length:
                title += f" · text ends after {len(chunk.token_ids)}"
            _write(console, Text(), _tree(chunk.trace, title, console.width))
            _write(console, _text(before, chunk))
        before = (before + chunk.text)[-_BEFORE:]
        yield chunk
    _write(console, Text())


def _write(console: Console, *lines: Text | Tree) -> None:
    # Not by the console, which ends the process when a pipe is closed.
    with console.capture() as captured:
        for line in lines:
            console.print(line)
    sys.stdout.write(captured.get())
    sys.stdout.flush()


def _tree(trace: StepTrace, title: str, width: int) -> Tree:
    root, *nodes = trace.picture()
    tree = Tree(Text(title), guide_style="dim")
    widest = min(_LABEL, max((cell_len(node.label) for node in nodes), default=0))
    _grow(tree, root.children, widest, width - _INDENT - _PROBABILITIES)
    return tree


def _grow(tree: Tree, children: list[TreeNode], widest: int, room: int) -> None:
    """Add nodes to a tree. An only child stands below its parent, so that a deep tree is not wide.

    Args:
        widest: columns of the widest label.
        room: columns of a label on this level.
    """
    for child in children:
        chain = [child]
        while len(chain[-1].children) == 1:
            chain += chain[-1].children
        lines = Text("\n", no_wrap=True, overflow="ellipsis").join(_line(node, min(widest, room)) for node in chain)
        _grow(tree.add(lines), chain[-1].children, widest, room - _INDENT)


def _line(node: TreeNode, columns: int) -> Text:
    label = Text(node.label)
    label.truncate(max(columns, 4), overflow="ellipsis", pad=True)
    return Text(f"{MARKS[node.kind]} {label.plain}  {node.probabilities}".rstrip(), style=_STYLES[node.kind])


def _text(before: str, chunk: Chunk) -> Text:
    """The end of the text before a step, and what the step adds."""
    line = Text("text: " if len(before) < _BEFORE else "text: …")
    line.append(escape_invisible(before), "dim")
    for place, piece in enumerate(chunk.pieces):
        line.append(escape_invisible(piece), _STYLES["accepted" if place < chunk.accepted else "from the target"])
    return line
