"""A first-order language model given by a table: the output distribution of an engine can be computed by hand."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mcsd.models.layout import TokenLayout
from mcsd.models.protocol import Cache, ModelOutput


class TabularModel:
    """A language model whose next token depends on the last one only.

    Args:
        table: float ``[V, V]``: row = last token, entries = next-token probabilities. Serves as target and draft.

    Raises:
        ValueError: the table is not square, or a row is not a distribution.
    """

    max_length: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    name = "tabular"
    captures = False
    """Whether forwards on a GPU may be captured in CUDA graphs."""

    def __init__(self, table: Tensor) -> None:
        if table.dim() != 2 or table.shape[0] != table.shape[1]:
            raise ValueError(f"a table of shape {tuple(table.shape)} is not [V, V]")
        sums = table.sum(-1)
        if (table < 0).any() or not torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
            raise ValueError("each row of the table must be a distribution")
        self.vocab_size = len(table)
        self.device: torch.device = table.device
        self._logits = table.log()

    def new_cache(self, max_batch: int, max_tokens: int) -> Cache:
        """A cache of lengths only: the last token is always among the tokens of a forward."""
        return Cache(max_batch, self.device)

    def forward(
        self,
        tokens: Tensor,
        layout: TokenLayout,
        cache: Cache,
        sequences: slice = slice(None),
        logits: bool = True,
        hidden_layers: Sequence[int] = (),
    ) -> ModelOutput:
        """Look the tokens up in the table; the hidden state is the one-hot of the token."""
        # A draft may be given an added token of the target; any token serves.
        tokens = tokens.clamp(max=self.vocab_size - 1)
        states = torch.nn.functional.one_hot(tokens, self.vocab_size).to(self._logits.dtype)
        return ModelOutput(self._logits[tokens], states if hidden_layers else None)
