"""Reading a text: into a cache, in pieces that keep the memory of a forward small; or at once, for all its logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mcsd.models.base import Block, Cache, LanguageModel, Output

CHUNK = 256
"""Tokens a forward reads at most: past this a product is bound by arithmetic, and more only costs memory."""


def prefill(
    model: LanguageModel, cache: Cache, row: int, tokens: list[int], hidden: Sequence[int] = ()
) -> Tensor | None:
    """Read and commit ``tokens`` in one row.

    Returns:
        The hidden states ``[1, len(tokens), F]`` of the layers asked for, None if there are none.
    """
    states = []
    rows = slice(row, row + 1)
    for start in range(0, len(tokens), CHUNK):
        piece = torch.tensor([tokens[start : start + CHUNK]], device=model.device)
        length = piece.shape[1]
        output = model.forward(piece, Block.chain(length), cache, rows, logits=False, hidden=hidden)
        cache.commit(torch.arange(length, device=model.device)[None], torch.tensor([length], device=model.device), rows)
        if output.hidden is not None:
            states.append(output.hidden)
    return torch.cat(states, dim=1) if states else None


@torch.no_grad()
def forward_over(model: LanguageModel, tokens: list[int], hidden: Sequence[int] = ()) -> Output:
    """One forward over a text in a cache of its own; ``hidden`` as in `LanguageModel.forward`."""
    cache = model.new_cache(1, len(tokens))
    cache.add()
    return model.forward(torch.tensor([tokens], device=model.device), Block.chain(len(tokens)), cache, hidden=hidden)
