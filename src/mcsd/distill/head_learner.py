"""Training of a draft head: from the target's hidden states to its distributions, several steps ahead.

The head drafts deeper levels of a tree from its own outputs, so it is trained on them too (EAGLE-3, Li et al. 2025,
arXiv 2503.01840, "training-time test"): step j reads the output of step j-1 one position before.
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
from mcsd.models.draft_head import DraftHead, HeadConfig
from mcsd.models.masks import additive_mask

STEPS_AHEAD = 2
"""Number of steps ahead that are trained."""

_STEP_DECAY = 0.8
"""Factor of the loss weight for each further step."""

_INITIAL_STD = 0.02
"""Of the weights of its decoder layers before training, as in transformers."""


class HeadLearner:
    """A draft head in training.

    Args:
        config: of the head.
        teacher: the target's embeddings and output matrix, restricted to the draft vocabulary.
        loss: a function of `mcsd.distill.losses`.
        records: training texts, for the scale of the target's hidden states.
    """

    batches_per_step = 1
    """See `Learner.batches_per_step`."""

    def __init__(self, config: HeadConfig, teacher: Teacher, loss: Loss, records: Sequence[Record]) -> None:
        self.network = DraftHead(config).to(teacher.device)
        self.network.vocabulary.copy_(teacher.vocabulary)
        for module in self.network.decoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_INITIAL_STD)
        self._teacher = teacher
        self._loss = loss
        # The output matrix is the target's, so the final norm starts at the scale of the target's hidden states.
        last = torch.cat([record.hidden_states[:, -config.hidden_size :].float() for record in records[:64]])
        self.network.decoder.norm.weight.data.copy_(0.3 * last.pow(2).mean(0).sqrt())

    def optimizers(self, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
        """Muon for matrices, AdamW for the rest."""
        parameters = list(self.network.parameters())
        matrices = [p for p in parameters if p.dim() == 2]
        rest = [p for p in parameters if p.dim() != 2]
        return [
            Muon(matrices, lr=1e-2, weight_decay=0.01, dtype=dtype),
            torch.optim.AdamW(rest, lr=5e-3, weight_decay=0.0),
        ]

    def loss(self, batch: Batch) -> Tensor:
        """The weighted mean loss over the steps ahead."""
        target = self._teacher.log_probabilities(batch)
        weights = [_STEP_DECAY**step for step in range(STEPS_AHEAD)]
        losses = [self._loss(target, draft) for draft in self.draft(batch)]
        return sum((w * loss for w, loss in zip(weights, losses, strict=True)), target.new_zeros(())) / sum(weights)

    def draft(self, batch: Batch) -> list[Tensor]:
        """For each step ahead, the head's log-probabilities ``[N, K]`` at the batch's positions."""
        sequences, length = batch.tokens.shape
        embedding = self._teacher.embed(batch.tokens)
        hidden = self.network.project_features(_shift_right(batch.hidden_states))
        position = torch.arange(length, device=batch.tokens.device)
        distance = position[:, None] - position
        past = DynamicCache()
        outputs = []
        for step in range(STEPS_AHEAD):
            # Keys of the first step come from the target's hidden states, which a drafter has up to the root of its
            # tree; the keys of step m are m - 1 positions further down the path.
            allowed = [distance >= step, *(distance == step - m for m in range(1, step + 1))]
            mask = additive_mask(torch.cat(allowed, dim=1)[None], hidden.dtype)
            hidden = self.network(hidden, embedding, mask, position.expand(sequences, -1), past)
            outputs.append(self._teacher.output(hidden.flatten(0, 1)[batch.positions]).log_softmax(-1))
            hidden = _shift_right(hidden)
        return outputs


def _shift_right(hidden: Tensor) -> Tensor:
    """``[B, T, F]`` shifted by one position; the first is zero."""
    return nn.functional.pad(hidden[:, :-1], (0, 0, 1, 0))
