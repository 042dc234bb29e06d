"""A draft head whose layers run in our kernels: one call per level of the tree."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mcsd.cpu.native_layers import MAX_FUSED_TOKENS, NativeLayers, NativeNorm
from mcsd.cpu.native_linear import NativeLinear
from mcsd.cpu.packed_linear import PackedLinear
from mcsd.cpu.packing import pack, pack_linear
from mcsd.cpu.weight_plan import WeightPlan
from mcsd.kernels import DTYPES, WeightFormat, call, decoder, readable
from mcsd.kernels.gemm import Linear
from mcsd.models.bound_head import BoundHead
from mcsd.models.draft_head import DraftHead, EagleLayer, PartsNorm
from mcsd.models.kv_cache import CacheView
from mcsd.models.layout import TokenLayout
from mcsd.models.llama import LlamaModel
from mcsd.models.protocol import LanguageModel, ModelOutput

_INT8_ACTIVATIONS = (WeightFormat.W8A8, WeightFormat.W4A8)


def bind_head(head: DraftHead, target: LanguageModel, name: str, plan: WeightPlan) -> BoundHead:
    """Bind a draft head to its target, packed as a plan says.

    With a native plan it runs in one call, unless its decoder layer is one of the target's own class (``mtp``).

    Raises:
        VocabularyMismatch, UnsupportedModel: it belongs to another target.
    """
    if plan.native and plan.dtype in DTYPES and isinstance(head.decoder, LlamaModel):
        return NativeBoundHead(head, target, name, plan)
    bound = BoundHead(head, target, name, str(plan))
    if plan.packed:
        _pack(bound, plan)
    return bound


def _pack(bound: BoundHead, plan: WeightPlan) -> None:
    reads_raw = isinstance(bound.head.feature_norm, nn.Identity)

    def packed(name: str, linear: nn.Linear) -> PackedLinear:
        if reads_raw and name == "feature_proj" and plan.format in _INT8_ACTIVATIONS:
            # Some numbers of hidden states are hundreds of times larger than others: int8 would lose the small ones.
            return pack_linear(linear, replace(plan, format=WeightFormat.BFP16 if plan.native else None))
        return pack_linear(linear, plan)

    pack(bound.head, plan, packed)
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
        self._layers = NativeLayers(head.decoder, head.config.skips_first)
        self._first: nn.Module = head.decoder.layers[0]
        of_state, of_embedding = head.input_norm, head.input_norm
        normed_residual = False
        if isinstance(self._first, EagleLayer):
            of_state, of_embedding = self._first.hidden_norm, self._first.input_layernorm
            normed_residual = self._first.norm_before_residual
        norms = [NativeNorm(norm) for norm in (head.feature_norm, of_state, of_embedding, head.output_norm)]
        linears: Any = head.feature_proj, head.input_proj, self.lm_head
        # The struct holds pointers to the tensors of these.
        self._owners = norms, [(one.weight, one.scale, one.bias) for one in linears if isinstance(one, NativeLinear)]
        feature_norm, state_norm, embedding_norm, output_norm = (norm.struct for norm in norms)
        feature_proj, input_proj, lm_head = (
            linear.struct() if isinstance(linear, NativeLinear) else Linear() for linear in linears
        )
        parts = head.feature_norm.parts if isinstance(head.feature_norm, PartsNorm) else 1
        self._struct = decoder.HeadWeights(
            *(feature_norm, parts, feature_proj),
            *(state_norm, embedding_norm, head.config.embedding_first, input_proj, normed_residual),
            *(self._layers.struct, output_norm, lm_head),
        )

    def _run(
        self, embedding: Tensor, hidden: Tensor, layout: TokenLayout, view: CacheView, logits: bool, own: bool
    ) -> ModelOutput:
        layers, (batch, length, _) = self._layers, embedding.shape
        tokens, dtype = batch * length, layers.dtype
        if tokens > MAX_FUSED_TOKENS:
            return self._run_each(embedding, hidden, layout, view, logits, own)
        hidden = readable(hidden.to(dtype), tokens, layers.hidden_size if own else self.config.num_features, dtype)
        embedding = readable(embedding, tokens, layers.hidden_size, dtype)
        metadata = layers.metadata(embedding, layout, view)
        output = torch.empty_like(embedding)
        scores = output.new_empty(batch, length if logits else 0, len(self.vocabulary))
        call("draft_head", self._struct, hidden, own, embedding, dtype, metadata, output, scores if logits else None)
        return ModelOutput(scores, output)

    def _run_each(
        self, embedding: Tensor, hidden: Tensor, layout: TokenLayout, view: CacheView, logits: bool, own: bool
    ) -> ModelOutput:
        """`_run`, layer by layer."""
        inputs = self.head.project_inputs(hidden if own else self.head.project_features(hidden), embedding)
        pair = None
        if isinstance(self._first, EagleLayer):
            pair, inputs = self._first.split(inputs)
        output = self._layers.run_each(inputs, layout, view, pair=pair)[-1]
        return ModelOutput(self.lm_head(self.head.normalize(output if logits else output[:, :0])), output)
