"""The bounds of an engine's options, checked before anything is read or allocated."""

from collections.abc import Sequence
from pathlib import Path

from mcsd.errors import InvalidOption, UnknownScheme
from mcsd.schemes import SCHEMES
from mcsd.tree import TreeShape

MAX_ROWS = 4096
MAX_SLOTS = 1 << 20
MAX_TOKENS = 1 << 24
"""Bounds of ``max_batch``, ``max_length`` and their product, for which the cache is allocated."""


def check_options(
    scheme: str, tree: str | Path | Sequence[int] | TreeShape, max_batch: int, max_length: int
) -> TreeShape | None:
    """Say by name what cannot be.

    Returns:
        The tree, read; None for "auto".

    Raises:
        UnknownScheme, InvalidTree, InvalidOption: not a scheme; no tree, or none that the scheme can judge; not a size.
    """
    if not isinstance(scheme, str) or scheme not in SCHEMES:
        raise UnknownScheme(f"scheme {scheme!r:.40} is unknown", f"one of {', '.join(SCHEMES)}")
    for name, value, most in (("max_batch", max_batch, MAX_ROWS), ("max_length", max_length, MAX_SLOTS)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise InvalidOption(f"{name}={value!r:.40} is not a whole number from 1 to {most}", f"give such a {name}")
    if max_batch * max_length > MAX_TOKENS:
        raise InvalidOption(
            f"max_batch={max_batch} rows of max_length={max_length} are more than {MAX_TOKENS} tokens", "lower one"
        )
    if isinstance(tree, str) and tree == "auto":
        return None
    shape = TreeShape.parse(tree)
    SCHEMES[scheme].check(shape)
    return shape
