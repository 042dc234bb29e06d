"""Teaching a whole small model, given or pruned: the paper's fine-tuned drafts (Yang et al. 2024, section 4)."""

from typing import Any

import torch
from torch import Tensor, nn

from mcsd.distill.batches import Batch
from mcsd.distill.losses import Loss
from mcsd.distill.teacher import Teacher
from mcsd.errors import InvalidOption, UnsupportedModel
from mcsd.models.trimming import rows_of


class ModelLearner:
    """A causal language model in training. Its embeddings and output matrix stay as they are.

    Args:
        network: a ``PreTrainedModel`` in float32, not packed.
        teacher: the target's two matrices, and the tokens that count.
        loss: what to make small.
        rate: the learning rate: small for a model that drafts well already, larger for a pruned one.
        batches: see `Learner.batches`; more for a model whose gradients are mostly noise because it is good already.
    """

    def __init__(self, network: Any, teacher: Teacher, loss: Loss, rate: float, batches: int) -> None:
        self.batches = batches
        self.network: Any = network.eval()
        self._teacher = teacher
        self._loss = loss
        self._rate = rate
        for matrix in (network.get_input_embeddings(), network.get_output_embeddings()):
            matrix.requires_grad_(False)
        self._output = rows_of(network.get_output_embeddings(), teacher.vocabulary)

    def optimizers(self, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
        """AdamW, which multiplies no matrices."""
        trained = [p for p in self.network.parameters() if p.requires_grad]
        return [torch.optim.AdamW(trained, lr=self._rate, betas=(0.9, 0.95), weight_decay=0.0)]

    def loss(self, batch: Batch) -> Tensor:
        """The loss of the next token."""
        return self._loss(self._teacher.log_probabilities(batch), self.draft(batch)[0])

    def draft(self, batch: Batch) -> list[Tensor]:
        """Log-probabilities ``[N, K]`` at the batch's positions."""
        tokens = batch.tokens
        states = self.network.base_model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False
        ).last_hidden_state
        return [self._output(states.flatten(0, 1)[batch.positions]).float().log_softmax(-1)]


def prune(network: Any, layers: int) -> None:
    """Drop layers of a model in place. What stays is evenly spaced from the first layer to the last.

    Raises:
        UnsupportedModel: its layers cannot be told.
        InvalidOption: it has no more layers than that.
    """
    holder, name, stack = layers_of(network, layers)
    config = network.config.get_text_config()
    total = len(stack)
    kept = sorted({round(i * (total - 1) / max(1, layers - 1)) for i in range(layers)})
    setattr(holder, name, nn.ModuleList([stack[i] for i in kept]))
    for place, layer in enumerate(getattr(holder, name)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]


def layers_of(network: Any, fewer: int) -> tuple[nn.Module, str, nn.ModuleList]:
    """The list of a model's layers: the module that holds it, its name there, and itself.

    Args:
        network: the model.
        fewer: layers that it must have more than.

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
            f"{type(network).__name__}: the layers to prune cannot be told", "give a draft to begin with: --init"
        )
    if fewer >= total:
        raise InvalidOption(f"layers={fewer} of a model that has {total}", f"give at most {total - 1}")
    return stacks[0]
