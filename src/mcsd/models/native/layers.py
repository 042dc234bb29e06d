"""Decoder layers that run in the kernels: all layers of a model, and the norm behind them, in one call."""

from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from mcsd.kernels import DTYPES, call, readable
from mcsd.models import fusion
from mcsd.models.cache import CacheView
from mcsd.models.halves import run_halves
from mcsd.models.masks import windows
from mcsd.models.native import structs
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
        self.struct = structs.Layer(before, structs.Behind(*behind), self.attention.scaling, 0)

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
        for layer, window in zip(layers, windows(model.config), strict=True):
            layer.window = window or 0
        self.struct = structs.Stack(layers, len(layers), structs.Norm(self._norm.data_ptr(), model.norm.eps))
        self.width: int = model.norm.weight.shape[0]
        self.dtype: torch.dtype = model.norm.weight.dtype
        _, shared, size = self._layers[0].counts
        self._like = model.norm.weight.new_empty(0, shared, 0, size)
        self._rotary: fusion.Rotary = model.rotary_emb
        self._positions: int = model.config.max_position_embeddings

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

    def place(self, view: CacheView, shape: torch.Size) -> structs.Place:
        """Where the tokens of a forward stand.

        Raises:
            ValueError: the view is not of rows and tokens ``shape [B, n]``, or its block is broken.
            IndexError: as `CacheView.store`.
        """
        block, store = view.block, view.store(self._like)
        if shape != (len(view.lengths), len(block.mask)):
            raise ValueError(f"{len(block.mask)} tokens in {len(view.lengths)} rows are to be read, not {tuple(shape)}")
        of_layer, of_values, of_row, of_head, *_ = store.stride()
        keys = store.data_ptr() + view.rows.start * of_row * store.element_size()
        # Positions are below the number of slots.
        table = self._rotary.table(self._like, min(view.columns, self._positions))
        cosines, sines = table
        place = structs.Place(
            *(keys, keys + of_values * store.element_size(), of_layer, of_row, of_head),
            *(len(view.lengths), block.before, len(block.mask)),
            *(view.lengths.data_ptr(), *(part.data_ptr() for part in block.laid_out)),
            *(self._positions, cosines.data_ptr(), sines.data_ptr()),
        )
        place.kept = view, table
        return place


class _Decoder:
    """The forward of a model of transformers. For the few tokens of a tree it asks the view of the cache what they are.

    Args:
        model: one that a `Stack` fits.
    """

    def __init__(self, model: Any) -> None:
        # The model holds this.
        self._model = ref(model)
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
        """See ``LlamaModel.forward``, which runs whatever is something else."""
        model: Any = self._model()
        stack = self._stack
        if input_ids is None or not isinstance(past_key_values, CacheView) or input_ids.numel() > MOST_TOKENS:
            given = {"position_ids": position_ids, "past_key_values": past_key_values, **others}
            given |= {"output_hidden_states": output_hidden_states}
            out: BaseModelOutputWithPast = type(model).forward(model, input_ids, attention_mask, **given)
            return out
        states = readable(model.embed_tokens(input_ids), input_ids.numel(), stack.width, stack.dtype)
        last = torch.empty_like(states)
        every = states.new_empty(stack.struct.count, *states.shape) if output_hidden_states else None
        place = stack.place(past_key_values, input_ids.shape)
        call("stack", stack.struct, states, stack.dtype, place, every, last)
        # Of the last layer it is the normed one.
        hidden = None if every is None else (states, *every.unbind()[:-1], last)
        return BaseModelOutputWithPast(last_hidden_state=last, past_key_values=past_key_values, hidden_states=hidden)


def reads_blocks(network: Any, tokens: int) -> bool:
    """Whether a model reads so many tokens in one call, and so needs neither a mask nor positions."""
    model = getattr(network, network.base_model_prefix, None)
    return tokens <= MOST_TOKENS and model is not None and isinstance(vars(model).get("forward"), _Decoder)
