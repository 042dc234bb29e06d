"""Decoder layers that run in the kernels: all layers of a model, and the norm behind them, in one call."""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from mcsd.models import fusion
from mcsd.models.cache import CacheView
from mcsd.models.halves import run_halves
from mcsd.models.native import structs
from mcsd.models.native.library import DTYPES, call, readable
from mcsd.models.native.linear import NativeLinear

_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
_MODELS = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
"""Classes of transformers that are known to do what the kernels do with their parts."""

_SILU = {"SiLU", "SiLUActivation"}
"""Names of what the kernels' gate is, in torch and transformers."""

MOST_TOKENS = 240
"""Tokens of a forward that go through all layers in one call; of more the attention is torch's, which is made for
them."""


def replace_layers(network: nn.Module) -> None:
    """Let the models and decoder layers of which all is known run in the kernels; linear layers are native already."""
    for module in network.modules():
        layer: Any = module
        if type(layer).__name__ in _LAYERS and _is_known(layer):
            layer.forward = _DecoderLayer(layer)
    for module in network.modules():
        model: Any = module
        if type(model).__name__ in _MODELS and Stack.fits(model):
            model.forward = _Decoder(model)


def _is_known(layer: Any) -> bool:
    """Whether the kernels compute what a layer's parts do."""
    attention, block = layer.self_attn, layer.mlp
    norms = layer.input_layernorm, layer.post_attention_layernorm
    return (
        isinstance(attention, fusion.Attention)
        and isinstance(block, fusion.FeedForward)
        and type(block.activation).__name__ in _SILU
        and all(isinstance(norm, fusion.Norm) and norm.weight.dtype in DTYPES for norm in norms)
        and all(isinstance(each, NativeLinear) for each in (attention.into, attention.out, block.into, block.out))
    )


class _DecoderLayer:
    """The forward of a decoder layer: two calls around torch's attention."""

    def __init__(self, layer: Any) -> None:
        self.attention: fusion.Attention = layer.self_attn
        self.counts = self.attention.query_heads, self.attention.key_heads, self.attention.head_size
        # What the kernels have pointers to must outlive them, whatever becomes of the layer.
        self._kept: list[Tensor | None] = []
        own = [self._norm(norm) for norm in self.attention.norms or ()] or [structs.Norm(None, -1.0)] * 2
        norm, later = self._norm(layer.input_layernorm), self._norm(layer.post_attention_layernorm)
        before = structs.Before(norm, self._linear(self.attention.into), *own, *self.counts)
        behind = self._linear(self.attention.out), later, self._linear(layer.mlp.into), self._linear(layer.mlp.out)
        self.struct = structs.Layer(before, structs.Behind(*behind), self.attention.scaling)

    def _norm(self, norm: Any) -> structs.Norm:
        weight = norm.weight.detach().float()
        self._kept.append(weight)
        return structs.Norm(weight.data_ptr(), norm.eps)

    def _linear(self, linear: Any) -> structs.Linear:
        self._kept += [linear.weight, linear.scale, linear.bias]
        struct: structs.Linear = linear.struct()
        return struct

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        **unused: Any,
    ) -> Tensor:
        """See ``LlamaDecoderLayer.forward``; the angles are a `Rotary`'s."""
        halves = self._before, self._behind, self.attention
        return run_halves(*halves, hidden_states, attention_mask, position_embeddings, past_key_values)

    def _before(self, states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (heads, shared, size), before = self.counts, self.struct.before
        tokens, dtype = len(states), states.dtype
        widths = (before.into.inputs, size, size)
        parts = [readable(part, tokens, width, dtype) for part, width in zip((states, cos, sin), widths, strict=True)]
        out = states.new_empty(tokens, before.into.outputs)
        call("before", before, *parts, dtype, tokens, out)
        queries, keys, values = out.view(tokens, -1, size).split_with_sizes([heads, shared, shared], dim=1)
        return queries, keys, values

    def _behind(self, states: Tensor, seen: Tensor) -> Tensor:
        behind, tokens, dtype = self.struct.behind, len(states), states.dtype
        states = readable(states, tokens, behind.out.outputs, dtype)
        out = torch.empty_like(states)
        call("behind", behind, states, readable(seen, tokens, behind.out.inputs, dtype), dtype, tokens, out)
        return out


class Stack:
    """The layers of a model, and the norm behind them.

    Args:
        model: one that `fits`.
    """

    def __init__(self, model: Any) -> None:
        # They hold what the structs point to.
        self._layers: list[_DecoderLayer] = [layer.forward for layer in model.layers]
        self._norm: Tensor = model.norm.weight.detach().float()
        layers = (structs.Layer * len(self._layers))(*(layer.struct for layer in self._layers))
        self.struct = structs.Stack(layers, len(layers), structs.Norm(self._norm.data_ptr(), model.norm.eps))
        self.width: int = model.norm.weight.shape[0]
        self.dtype: torch.dtype = model.norm.weight.dtype
        _, shared, self._size = self._layers[0].counts
        self._like = model.norm.weight.new_empty(0, shared, 0, self._size)
        self._kinds: Sequence[str] = getattr(model.config, "layer_types", None) or [""] * len(layers)

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the kernels know all of a model's layers, and what stands around them."""
        forwards = [vars(layer).get("forward") for layer in model.layers]
        known = [forward for forward in forwards if isinstance(forward, _DecoderLayer)]
        return (
            len(known) == len(forwards) > 0
            and [layer.attention.layer for layer in known] == list(range(len(known)))
            and len({layer.counts for layer in known}) == 1
            and isinstance(model.norm, fusion.Norm)
            and isinstance(model.rotary_emb, fusion.Rotary)
        )

    def place(
        self, shape: torch.Size, mask: Tensor | Mapping[str, Tensor], angles: tuple[Tensor, Tensor], view: CacheView
    ) -> tuple[structs.Place, list[Tensor]]:
        """Where the tokens of a forward stand, and the tensors that the kernels read of it, which must live as long.

        Args:
            shape: rows, and tokens of each.
            mask: additive, ``[B, 1, n, columns]``, for all layers or for each kind of them.
            angles: of a `Rotary`.
            view: where keys and values go.

        Raises:
            ValueError: mask or angles are not of this size and dtype.
            IndexError: as `CacheView.place`.
        """
        (rows, length), tokens = shape, shape.numel()
        store, first, starts, columns = view.place(self._like, 0)
        of_layer, of_values, of_row, of_head, *_ = store.stride()
        keys = store.data_ptr() + first * of_row * store.element_size()
        masks = {
            kind: readable(mask if isinstance(mask, Tensor) else mask[kind], tokens, columns, self.dtype)
            for kind in set(self._kinds)
        }
        pointers = (ctypes.c_void_p * len(self._kinds))(*(masks[kind].data_ptr() for kind in self._kinds))
        # All rows may have the same positions.
        together = (part if len(part) == rows else part.expand(rows, -1, -1, -1) for part in angles)
        turns = [readable(part, tokens, self._size, self.dtype) for part in together]
        place = structs.Place(
            *(keys, keys + of_values * store.element_size(), of_layer, of_row, of_head, starts.data_ptr()),
            *(rows, length, columns, pointers, *(part.data_ptr() for part in turns)),
        )
        return place, [*masks.values(), *turns, starts]


class _Decoder:
    """The forward of a model of transformers."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._stack = Stack(model)

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        output_hidden_states: bool = False,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """See ``LlamaModel.forward``, which runs whatever is not the few tokens of a tree."""
        model, stack = self._model, self._stack
        if not isinstance(past_key_values, CacheView) or input_ids is None or input_ids.numel() > MOST_TOKENS:
            given = {"position_ids": position_ids, "past_key_values": past_key_values, **others}
            given |= {"output_hidden_states": output_hidden_states}
            out: BaseModelOutputWithPast = type(model).forward(model, input_ids, attention_mask, **given)
            return out
        embedded = model.embed_tokens(input_ids)
        angles = model.rotary_emb(embedded, position_ids=position_ids)
        states = readable(embedded, input_ids.numel(), stack.width, stack.dtype)
        place, held = stack.place(input_ids.shape, attention_mask, angles, past_key_values)
        last = torch.empty_like(states)
        every = states.new_empty(stack.struct.count, *states.shape) if output_hidden_states else None
        call("stack", stack.struct, states, stack.dtype, place, every, last)
        del held
        # Of the last layer it is the normed one.
        hidden = None if every is None else (states, *every[:-1], last)
        return BaseModelOutputWithPast(last_hidden_state=last, past_key_values=past_key_values, hidden_states=hidden)
