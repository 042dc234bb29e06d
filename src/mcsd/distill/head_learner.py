"""Training of a draft head: from the target's hidden states to its distributions, several levels of a tree deep.

The head drafts deeper levels of a tree from its own outputs, so it is trained on them too (EAGLE-3, Li et al. 2025,
arXiv 2503.01840, "training-time test"): step j reads the output of step j-1 one position before.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mcsd.distill.batches import Batch
from mcsd.distill.losses import Loss
from mcsd.distill.muon import Muon
from mcsd.distill.teacher import Teacher
from mcsd.models.draft_head import DraftHead
from mcsd.models.masks import additive_mask

_STEP_DECAY = 0.8
"""Factor of the loss weight for each further step."""

_MATRICES, _OUTPUT_MATRIX, _OTHERS = 1e-2, 3e-4, 5e-3
"""Learning rates of a new head: of Muon for the matrices of its layers; of AdamW for its output matrix, which begins as
the target's, and for all else."""

_MIN_SCALE = 1e-3
"""Smallest divisor of the target's hidden states."""


class HeadLearner:
    """A draft head in training. Its embeddings, if it has any, are frozen.

    Args:
        head: in float32, on the teacher's device, with the teacher's vocabulary.
        teacher: the target's embeddings and output matrix, restricted to the draft vocabulary.
        loss: a function of `mcsd.distill.losses`.
        steps_ahead: levels of a tree that it is trained on.
        is_trained: whether it goes on from trained weights.
        sample: some texts with the target's hidden states.
        rate: factor of the learning rates, which are those of a new head.
    """

    batches_per_step = 1
    """See `Learner.batches_per_step`."""

    def __init__(
        self,
        head: DraftHead,
        teacher: Teacher,
        loss: Loss,
        steps_ahead: int,
        is_trained: bool,
        sample: Batch,
        rate: float = 1.0,
    ) -> None:
        self.network = head.requires_grad_(True)
        if head.embed_tokens is not None:
            head.embed_tokens.requires_grad_(False)
        self._teacher = teacher
        self._loss = loss
        self._steps_ahead = steps_ahead
        self._rate = rate
        self._scale: Tensor | None = None
        if isinstance(head.feature_norm, nn.Identity):
            # Some numbers of hidden states are hundreds of times larger than others: their weights would hardly change.
            states = self._features(sample).flatten(0, 1)[sample.positions]
            self._scale = states.pow(2).mean(0).sqrt().clamp(min=_MIN_SCALE)
            if is_trained:
                self._feature_weight().mul_(self._scale)

    def finish(self) -> DraftHead:
        """The trained head. The learner is of no use afterwards."""
        if self._scale is not None:
            self._feature_weight().div_(self._scale)
        return self.network

    def _feature_weight(self) -> Tensor:
        projection: Any = self.network.feature_proj
        weight: Tensor = projection.weight.data
        return weight

    def _features(self, batch: Batch) -> Tensor:
        """``[B, T, F]``, the hidden states that the head reads."""
        return batch.hidden_states[..., : self.network.config.num_features]

    def optimizers(self, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
        """Muon for the matrices of layers, AdamW for the rest."""
        output = self.network.lm_head
        linears = [module for module in self.network.modules() if isinstance(module, nn.Linear)]
        of_linears = {id(linear.weight) for linear in linears}
        of_layers = {id(linear.weight) for linear in linears if linear is not output}
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if id(parameter) in of_layers]
        groups = [{"params": [p for p in trained if id(p) not in of_linears], "lr": self._rate * _OTHERS}]
        if output is not None:
            groups.append({"params": [output.weight], "lr": self._rate * _OUTPUT_MATRIX})
        return [
            Muon(matrices, lr=self._rate * _MATRICES, weight_decay=0.01, dtype=dtype),
            torch.optim.AdamW(groups, weight_decay=0.0),
        ]

    def loss(self, batch: Batch) -> Tensor:
        """The weighted mean loss over the steps ahead."""
        target = self._teacher.log_probabilities(batch)
        weights = [_STEP_DECAY**step for step in range(self._steps_ahead)]
        losses = [self._loss(target, draft) for draft in self.draft(batch)]
        return sum((w * loss for w, loss in zip(weights, losses, strict=True)), target.new_zeros(())) / sum(weights)

    def draft(self, batch: Batch) -> list[Tensor]:
        """For each step ahead, the head's log-probabilities ``[N, K]`` at the batch's positions."""
        features = self._features(batch)
        features = features if self._scale is None else features / self._scale
        ahead = hidden_states_ahead(self.network, self._teacher, batch, features, self._steps_ahead)
        return [self._logits(hidden).log_softmax(-1) for hidden in ahead]

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[N, K]`` of the head's hidden states ``[N, H]``."""
        normed = self.network.normalize(hidden)
        if self.network.lm_head is None:
            return self._teacher.output(normed)
        logits: Tensor = self.network.lm_head(normed)
        return logits.float()


def hidden_states_ahead(
    head: DraftHead, teacher: Teacher, batch: Batch, features: Tensor, steps_ahead: int
) -> list[Tensor]:
    """Run a head on texts as it drafts a tree: after the first step it reads its own outputs.

    Args:
        head: on the teacher's device.
        teacher: has the embeddings, if the head has none.
        batch: the texts.
        features: ``[B, T, F]``, the target's hidden states that the head reads.
        steps_ahead: levels of the tree.

    Returns:
        For each step ahead, the head's hidden states ``[N, H]`` at the batch's positions.
    """
    sequences, length = batch.tokens.shape
    embedding = (head.embed_tokens or teacher.embed)(batch.tokens)
    hidden = head.project_features(_shift_right(features))
    position = torch.arange(length, device=batch.tokens.device)
    distance = position[:, None] - position
    past = DynamicCache()
    outputs = []
    for step in range(steps_ahead):
        # Keys of the first step come from the target's hidden states, which a drafter has up to the root of its tree;
        # the keys of step m are m - 1 positions further down the path.
        allowed = [distance >= step, *(distance == step - m for m in range(1, step + 1))]
        if head.config.skips_first:
            # The first token has no hidden state before it.
            allowed[0] = allowed[0] & ((position > 0) | (position[:, None] == 0))
        mask = additive_mask(torch.cat(allowed, dim=1)[None], hidden.dtype)
        hidden = head(hidden, embedding, mask, position.expand(sequences, -1), past)
        outputs.append(hidden.flatten(0, 1)[batch.positions])
        hidden = _shift_right(hidden)
    return outputs


def _shift_right(hidden: Tensor) -> Tensor:
    """``[B, T, F]`` shifted by one position; the first is zero."""
    return nn.functional.pad(hidden[:, :-1], (0, 0, 1, 0))
