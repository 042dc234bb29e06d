"""Nodes of a picture of a candidate tree, for terminals and notebooks."""

from dataclasses import dataclass, field

MAX_NOT_ACCEPTED = 20
"""Candidates that are drawn at most, besides the accepted path."""

MARKS = {"accepted": "✓", "not accepted": "×", "from the target": "★"}
"""The mark of each kind of node."""

LEGEND = " · ".join([*(f"{mark} {kind}" for kind, mark in MARKS.items()), "probability: p target, q draft"])


@dataclass(eq=False)
class TreeNode:
    """A node of the picture; equal to itself only.

    Attributes:
        kind: a key of `MARKS`; "root" for the last token before the step.
        label: what `label_of` returns.
        probabilities: p, and q where the candidate was drawn from one; may be empty.
        children: in the order of the candidates; the target's own token comes last.
    """

    kind: str
    label: str = ""
    probabilities: str = ""
    children: list["TreeNode"] = field(default_factory=list)


def label_of(piece: str, token_id: int) -> str:
    """The text of a token in quotes, or its number if it has no text."""
    return f'"{escape_invisible(piece)}"' if piece else f"#{token_id}"


def escape_invisible(text: str) -> str:
    """Escape newlines, control characters and all else that has no glyph, and the backslash of the escapes."""
    return "".join(char if char.isprintable() and char != "\\" else repr(char)[1:-1] for char in text)


def probabilities_of(p: float | None, q: float | None = None) -> str:
    """p and q with three decimals; those that are None are left out."""
    return "  ".join(f"{name} {value:.3f}" for name, value in (("p", p), ("q", q)) if value is not None)
