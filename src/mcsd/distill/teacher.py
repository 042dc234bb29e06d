"""What of the target a draft learns from: its embeddings, its output matrix, and so, from recorded states, its law."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mcsd.distill.batches import Batch
from mcsd.distill.corpus import Record
from mcsd.errors import UnsupportedModel
from mcsd.models import TransformersModel
from mcsd.models.packing import dense_weight
from mcsd.models.prefill import forward_over
from mcsd.models.trimming import rows_of


def frequent(records: Sequence[Record], size: int, vocab_size: int, always: frozenset[int]) -> Tensor:
    """int32 ``[K]``, ascending: the ``size`` most frequent tokens of the text, and those that end one.

    Of equally frequent tokens the one with the lower id: byte-pair vocabularies are ordered by frequency.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for record in records:
        counts += record.tokens.long().bincount(minlength=vocab_size)[:vocab_size]
    counts[sorted(always)] = counts.max() + 1
    order = counts.argsort(descending=True, stable=True)[: min(size, vocab_size)]
    return order.sort().values.to(torch.int32)


def check_teachable(target: TransformersModel) -> None:
    """Recorded states must give the target's logits through its output matrix, and be as wide as its embeddings.

    Raises:
        UnsupportedModel: they do not: the logits are scaled or capped, or the states projected.
    """
    output = forward_over(target, list(range(4)), hidden=(0, -1))
    matrix, width = target.network.get_output_embeddings(), target.network.get_input_embeddings().weight.shape[1]
    assert output.hidden is not None
    if output.hidden.shape[-1] == 2 * width == 2 * dense_weight(matrix).shape[1]:
        logits = matrix(output.hidden[..., width:])
        if torch.allclose(logits, output.logits, atol=1e-3, rtol=1e-3):
            return
    raise UnsupportedModel(
        f"{target.name}: its logits are more than its output matrix times its last states",
        "such targets cannot be learned from; use a draft that is a model, or ngram",
    )


class Teacher:
    """The target's two matrices, in float32; nothing else of it is needed, or kept.

    Args:
        target: in any dtype; its embeddings become float32.
        vocabulary: int32 ``[K]``, the tokens that count.
    """

    def __init__(self, target: TransformersModel, vocabulary: Tensor) -> None:
        self.device = target.device
        self.vocabulary = vocabulary.to(self.device)
        self.embed: nn.Module = target.network.get_input_embeddings().requires_grad_(False).float()
        output = target.network.get_output_embeddings()
        self._whole = rows_of(output, torch.arange(target.vocab_size, device=self.device)).float()
        self._trimmed = rows_of(self._whole, self.vocabulary)

    def output(self, states: Tensor) -> Tensor:
        """Logits ``[N, K]`` of the tokens that count."""
        logits: Tensor = self._trimmed(states)
        return logits.float()

    @property
    def hidden_size(self) -> int:
        """Of the target's states."""
        return self._whole.weight.shape[1]

    @torch.no_grad()
    def log_probabilities(self, batch: Batch) -> Tensor:
        """The target's ``[N, K]`` at the batch's positions, renormalised over the tokens that count."""
        return self.output(self._last(batch)).log_softmax(-1)

    @torch.no_grad()
    def law(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The target's probabilities ``[N, K]`` of the tokens that count, of a sum up to 1; its argmax ``[N]``."""
        logits = self._whole(self._last(batch))
        return logits.softmax(-1)[:, self.vocabulary.long()], logits.argmax(-1)

    def _last(self, batch: Batch) -> Tensor:
        return batch.states.flatten(0, 1)[batch.positions, -self.hidden_size :]
