"""Engines for the checks and timings."""

import warnings
from typing import Any

import mcsd
from mcsd.errors import McsdWarning, UnsupportedModel


def make_engine(
    target: Any,
    draft: Any,
    tree: str,
    max_batch: int,
    max_length: int,
    *,
    scheme: str = "mcss-wor",
    optimize: bool = False,
) -> mcsd.Engine:
    """An engine of models given as objects.

    Raises:
        UnsupportedModel: ``optimize`` has no effect on them.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", McsdWarning)
        engine = mcsd.Engine(target, draft, None, tree, scheme, max_batch, max_length, optimize=optimize)
    without_effect = [str(one.message) for one in caught if "no effect" in str(one.message)]
    if optimize and without_effect:
        raise UnsupportedModel(without_effect[0])
    return engine
