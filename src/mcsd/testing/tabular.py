"""A first-order language model given by a table, so that the law of a whole engine can be computed by hand."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mcsd.models.base import Block, Cache, Output


class TabularModel:
    """The next token depends on the last one only.

    Args:
        table: float ``[V, V]``: row = last token, entries = next-token probabilities. Serves as target and draft.

    Raises:
        ValueError: the table is not square, or a row is not a distribution.
    """

    max_length: int | None = None
    device = torch.device("cpu")
    eos_token_ids: frozenset[int] = frozenset()
    name = "tabular"

    def __init__(self, table: Tensor) -> None:
        if table.dim() != 2 or table.shape[0] != table.shape[1]:
            raise ValueError(f"a table of shape {tuple(table.shape)}: not [V, V]")
        if (table < 0).any() or not torch.allclose(table.sum(-1), torch.ones(len(table), dtype=table.dtype), atol=1e-4):
            raise ValueError("each row of the table must be a distribution")
        self.vocab_size = len(table)
        self._logits = table.log()

    def new_cache(self, rows: int, slots: int) -> Cache:
        """Nothing but lengths: the last token is always among those a forward is given."""
        return Cache(rows, self.device)

    def forward(
        self,
        tokens: Tensor,
        block: Block,
        cache: Cache,
        rows: slice = slice(None),
        logits: bool = True,
        hidden: Sequence[int] = (),
    ) -> Output:
        """Look the rows up; the hidden state is the one-hot of the token."""
        states = torch.nn.functional.one_hot(tokens, self.vocab_size).to(self._logits.dtype)
        return Output(self._logits[tokens], states if hidden else None)
