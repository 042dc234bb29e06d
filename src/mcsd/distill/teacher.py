"""The parts of the target that training needs: its embeddings, and its output matrix, which gives its logits."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mcsd.distill.batches import Batch
from mcsd.distill.corpus import Record
from mcsd.errors import UnsupportedModel
from mcsd.models import DecoderModel
from mcsd.models.draft_vocabulary import input_size, output_rows
from mcsd.models.prefill import score_text


def most_frequent_tokens(records: Sequence[Record], size: int, tokens: Tensor, eos_token_ids: frozenset[int]) -> Tensor:
    """The ``size`` most frequent of some tokens, int32 ``[K]``, ascending; end-of-sequence tokens come first.

    Among equally frequent tokens, lower ids come first: byte-pair vocabularies are ordered by frequency.

    Args:
        records: texts whose tokens are counted.
        size: of the draft vocabulary.
        tokens: to choose from, integers ``[V]``, ascending.
        eos_token_ids: of the target.
    """
    largest = int(tokens.max()) + 1
    counts = torch.zeros(largest, dtype=torch.int64)
    for record in records:
        counts += record.tokens.long().bincount(minlength=largest)[:largest]
    counts[[token for token in eos_token_ids if token < largest]] = counts.max() + 1
    order = counts[tokens].argsort(descending=True, stable=True)[:size]
    return tokens[order].sort().values.to(torch.int32)


def check_teachable(target: DecoderModel) -> None:
    """Check that the last hidden states times the output matrix are the logits, and that sizes match the embeddings.

    Raises:
        UnsupportedModel: the logits are scaled or capped, or the hidden states projected.
    """
    output = score_text(target, list(range(4)), hidden_layers=(0, -1))
    matrix, width = target.lm_head, input_size(target.embed_tokens)
    assert output.hidden is not None
    if output.hidden.shape[-1] == 2 * width == 2 * input_size(matrix):
        logits = matrix(output.hidden[..., width:])
        if torch.allclose(logits, output.logits, atol=1e-3, rtol=1e-3):
            return
    raise UnsupportedModel(
        f"{target.name}: its logits are not its output matrix times its last hidden states",
        "no draft can be trained for such a target; use another draft model, or ngram",
    )


class Teacher:
    """The target's embeddings and output matrix, in float32; the rest of the target is not kept.

    Args:
        target: in any dtype; its embeddings become float32.
        vocabulary: int32 ``[K]``, the draft vocabulary.
    """

    def __init__(self, target: DecoderModel, vocabulary: Tensor) -> None:
        self.device = target.device
        self.vocabulary = vocabulary.to(self.device)
        embeddings = target.embed_tokens
        # The target may still be used, in its own dtype.
        if target.dtype != torch.float32:
            embeddings = copy.deepcopy(embeddings)
        self.embed: nn.Module = embeddings.requires_grad_(False).float()
        self._full_output = output_rows(target.lm_head, torch.arange(target.vocab_size, device=self.device)).float()
        self._draft_output = output_rows(self._full_output, self.vocabulary)

    def output(self, hidden: Tensor) -> Tensor:
        """Logits ``[N, K]`` over the draft vocabulary."""
        logits: Tensor = self._draft_output(hidden)
        return logits.float()

    @property
    def output_matrix(self) -> Tensor:
        """Weights ``[K, H]`` of the output matrix for the draft vocabulary."""
        return self._draft_output.weight.detach()

    @property
    def hidden_size(self) -> int:
        """The target's hidden size."""
        return self._full_output.weight.shape[1]

    @torch.no_grad()
    def log_probabilities(self, batch: Batch) -> Tensor:
        """The target's ``[N, K]`` at the batch's positions, renormalized over the draft vocabulary."""
        return self.output(self._last_hidden(batch)).log_softmax(-1)

    @torch.no_grad()
    def distribution(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The target's probabilities ``[N, K]`` of the draft vocabulary, not renormalized, and its argmax ``[N]``."""
        logits = self._full_output(self._last_hidden(batch))
        return logits.softmax(-1)[:, self.vocabulary.long()], logits.argmax(-1)

    def _last_hidden(self, batch: Batch) -> Tensor:
        return batch.hidden_states.flatten(0, 1)[batch.positions, -self.hidden_size :]
