"""Training of a small draft model, given or pruned: the paper's fine-tuned drafts (Yang et al. 2024, section 4)."""

from typing import Any

import torch
from torch import Tensor, nn

from mcsd.distill.batches import Batch
from mcsd.distill.losses import Loss
from mcsd.distill.teacher import Teacher
from mcsd.errors import InvalidOption, UnsupportedModel
from mcsd.models.draft_vocabulary import output_rows


class ModelLearner:
    """A causal language model in training. Its embeddings and output matrix are frozen.

    Args:
        network: a ``PreTrainedModel`` in float32, not packed.
        teacher: the target's embeddings and output matrix, and the draft vocabulary.
        loss: a function of `mcsd.distill.losses`.
        rate: learning rate: small for a given model, larger for a pruned one.
        batches_per_step: see `Learner.batches_per_step`; larger for a good model, whose gradients are mostly noise.
    """

    def __init__(self, network: Any, teacher: Teacher, loss: Loss, rate: float, batches_per_step: int) -> None:
        self.batches_per_step = batches_per_step
        self.network: Any = network.eval()
        self._teacher = teacher
        self._loss = loss
        self._rate = rate
        for matrix in (network.get_input_embeddings(), network.get_output_embeddings()):
            matrix.requires_grad_(False)
        self._output = output_rows(network.get_output_embeddings(), teacher.vocabulary)

    def optimizers(self, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
        """AdamW; it multiplies no matrices, so ``dtype`` is not used."""
        trained = [p for p in self.network.parameters() if p.requires_grad]
        return [torch.optim.AdamW(trained, lr=self._rate, betas=(0.9, 0.95), weight_decay=0.0)]

    def loss(self, batch: Batch) -> Tensor:
        """The loss at the next token."""
        return self._loss(self._teacher.log_probabilities(batch), self.draft(batch)[0])

    def draft(self, batch: Batch) -> list[Tensor]:
        """Log-probabilities ``[N, K]`` at the batch's positions."""
        tokens = batch.tokens
        hidden = self.network.base_model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False
        ).last_hidden_state
        return [self._output(hidden.flatten(0, 1)[batch.positions]).float().log_softmax(-1)]


def prune(network: Any, layers: int) -> None:
    """Drop layers of a model in place. The kept layers are evenly spaced and include the first and the last.

    Raises:
        UnsupportedModel: the list of its layers cannot be identified.
        InvalidOption: it does not have more than ``layers`` layers.
    """
    parent, name, stack = layer_stack(network, layers)
    config = network.config.get_text_config()
    total = len(stack)
    kept = sorted({round(i * (total - 1) / max(1, layers - 1)) for i in range(layers)})
    setattr(parent, name, nn.ModuleList([stack[i] for i in kept]))
    for index, layer in enumerate(getattr(parent, name)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]


def layer_stack(network: Any, layers: int) -> tuple[nn.Module, str, nn.ModuleList]:
    """The list of a model's layers: its parent module, its name there, and the list.

    Args:
        network: the model.
        layers: the model must have more than these.

    Raises:
        UnsupportedModel, InvalidOption: see `prune`.
    """
    total = network.config.get_text_config().num_hidden_layers
    stacks = [
        (module, name, child)
        for module in network.base_model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == total
    ]
    if len(stacks) != 1:
        raise UnsupportedModel(
            f"{type(network).__name__}: the list of its layers cannot be identified",
            "give a model to start from: --init",
        )
    if layers >= total:
        raise InvalidOption(f"layers={layers} is not less than the model's {total}", f"give at most {total - 1}")
    return stacks[0]
