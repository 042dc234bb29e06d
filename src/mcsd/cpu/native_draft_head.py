"""A draft head whose layers run in our kernels: one call per level of the tree."""

from typing import Any

import torch
from torch import Tensor, nn

from mcsd.cpu.native_layers import MAX_FUSED_TOKENS, NativeLayers
from mcsd.cpu.packing import pack, pack_linear
from mcsd.cpu.weight_plan import WeightPlan
from mcsd.kernels import DTYPES, call, decoder, readable
from mcsd.models.bound_head import BoundHead
from mcsd.models.draft_head import DraftHead
from mcsd.models.kv_cache import CacheView
from mcsd.models.layout import TokenLayout
from mcsd.models.protocol import LanguageModel, ModelOutput


def bind_head(head: DraftHead, target: LanguageModel, name: str, plan: WeightPlan) -> BoundHead:
    """Bind a draft head to its target, packed as a plan says.

    The layers of mcsd's own heads run in one call; those of published heads in torch, with packed linear layers.

    Raises:
        VocabularyMismatch, UnsupportedModel: it belongs to another target.
    """
    if plan.native and plan.dtype in DTYPES and head.config.kind == "mcsd":
        return NativeBoundHead(head, target, name, plan)
    bound = BoundHead(head, target, name, str(plan))
    if plan.packed:
        _pack(bound, plan)
    return bound


def _pack(bound: BoundHead, plan: WeightPlan) -> None:
    pack(bound.head, plan)
    own: nn.Module | None = bound.head.lm_head
    if own is not None:
        bound.lm_head = own
        return
    assert isinstance(bound.lm_head, nn.Linear)
    bound.lm_head = pack_linear(bound.lm_head, plan)


class NativeBoundHead(BoundHead):
    """A bound draft head in our kernels.

    Args:
        head, target, name: as for `BoundHead`.
        plan: a native plan.
    """

    def __init__(self, head: DraftHead, target: LanguageModel, name: str, plan: WeightPlan) -> None:
        super().__init__(head, target, name, str(plan))
        _pack(self, plan)
        self._layers = NativeLayers(head.decoder)
        linears: Any = head.feature_proj, head.input_proj, self.lm_head
        # The struct holds pointers to these.
        self._tensors = [(linear.weight, linear.scale, linear.bias) for linear in linears]
        feature_proj, input_proj, lm_head = (linear.struct() for linear in linears)
        norm = decoder.RMSNorm(None, torch.finfo(torch.float32).eps)
        self._struct = decoder.HeadWeights(feature_proj, input_proj, norm, self._layers.struct, lm_head)

    def _run(
        self, embedding: Tensor, hidden: Tensor, layout: TokenLayout, view: CacheView, logits: bool, own: bool
    ) -> ModelOutput:
        layers, (batch, length, _) = self._layers, embedding.shape
        tokens, dtype = batch * length, layers.dtype
        if tokens > MAX_FUSED_TOKENS:
            state = hidden if own else self.head.project_features(hidden)
            output = layers.run(self.head.project_inputs(state, embedding), layout, view)[-1]
            return ModelOutput(self.lm_head(output if logits else output[:, :0]), output)
        features = len(self.config.hidden_layers) * layers.hidden_size
        width = layers.hidden_size if own else features
        hidden = readable(hidden.to(dtype), tokens, width, dtype)
        embedding = readable(embedding, tokens, layers.hidden_size, dtype)
        metadata = layers.metadata(embedding, layout, view)
        output = torch.empty_like(embedding)
        scores = output.new_empty(batch, length if logits else 0, len(self.vocabulary))
        call("draft_head", self._struct, hidden, own, embedding, dtype, metadata, output, scores if logits else None)
        return ModelOutput(scores, output)
