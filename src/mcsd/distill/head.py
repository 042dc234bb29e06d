"""Teaching a head: the target's recorded states in, its recorded distributions out, several steps ahead.

The head drafts deeper levels of a tree from its own states. So it is trained on them too (EAGLE-3, Li et al. 2025,
arXiv 2503.01840, "training-time test"): step j reads what step j-1 gave one position before.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mcsd.distill.batches import Batch
from mcsd.distill.corpus import Record
from mcsd.distill.losses import Loss
from mcsd.distill.muon import Muon
from mcsd.distill.teacher import Teacher
from mcsd.models.head import DraftHead, HeadConfig
from mcsd.models.masks import additive

AHEAD = 2
"""Steps ahead that are trained."""

_WEIGHT = 0.8
"""Of each further step in the loss."""


class HeadLearner:
    """A head in training.

    Args:
        config: of the head.
        teacher: the target's embedding and output matrix, trimmed to the head's vocabulary.
        loss: what to make small.
        records: some of the text, for the size of the target's states.
    """

    batches = 1
    """See `Learner.batches`."""

    def __init__(self, config: HeadConfig, teacher: Teacher, loss: Loss, records: Sequence[Record]) -> None:
        self.network = DraftHead(config).to(teacher.device)
        self.network.vocabulary.copy_(teacher.vocabulary)
        self._teacher = teacher
        self._loss = loss
        # The output matrix is the target's, so the last norm begins at the size of what that matrix is used to.
        last = torch.cat([record.states[:, -config.hidden_size :].float() for record in records[:64]])
        self.network.body.norm.weight.data.copy_(0.3 * last.pow(2).mean(0).sqrt())

    def optimizers(self, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
        """Muon for the matrices, AdamW for the rest."""
        parameters = list(self.network.parameters())
        matrices = [p for p in parameters if p.dim() == 2]
        rest = [p for p in parameters if p.dim() != 2]
        return [
            Muon(matrices, lr=1e-2, weight_decay=0.01, dtype=dtype),
            torch.optim.AdamW(rest, lr=5e-3, weight_decay=0.0),
        ]

    def loss(self, batch: Batch) -> Tensor:
        """The weighted mean of the loss over the steps ahead."""
        target = self._teacher.log_probabilities(batch)
        weights = [_WEIGHT**step for step in range(AHEAD)]
        losses = [self._loss(target, draft) for draft in self.draft(batch)]
        return sum((w * loss for w, loss in zip(weights, losses, strict=True)), target.new_zeros(())) / sum(weights)

    def draft(self, batch: Batch) -> list[Tensor]:
        """For each step ahead, the head's log-probabilities ``[N, K]`` at the batch's positions."""
        rows, length = batch.tokens.shape
        embedding = self._teacher.embed(batch.tokens)
        state = self.network.fused(_later(batch.states))
        place = torch.arange(length, device=batch.tokens.device)
        distance = place[:, None] - place
        past = DynamicCache()
        given = []
        for step in range(AHEAD):
            # Keys of the first step come from the target's states, which a drafter has up to where its tree begins;
            # those of step m stand m - 1 positions further down the path.
            allowed = [distance >= step, *(distance == step - m for m in range(1, step + 1))]
            mask = additive(torch.cat(allowed, dim=1)[None], state.dtype)
            state = self.network(state, embedding, mask, place.expand(rows, -1), past)
            given.append(self._teacher.output(state.flatten(0, 1)[batch.positions]).log_softmax(-1))
            state = _later(state)
        return given


def _later(states: Tensor) -> Tensor:
    """``[B, T, F]`` moved one position on; zeros come first."""
    return nn.functional.pad(states[:, :-1], (0, 0, 1, 0))
