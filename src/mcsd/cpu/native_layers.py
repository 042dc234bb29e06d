"""The decoder layers of a model in our kernels: one call for the few tokens of a tree, layer by layer for more."""

from typing import Any

import torch
from torch import Tensor, nn

from mcsd.cpu.native_linear import NativeLinear
from mcsd.kernels import DTYPES, call, decoder, readable
from mcsd.kernels.attention import AttentionMetadata
from mcsd.models.draft_head import EagleLayer, PartsNorm
from mcsd.models.fusion import FusedAttention, FusedMLP, FusedRMSNorm, FusedRotary
from mcsd.models.kv_cache import CacheView
from mcsd.models.layout import TokenLayout
from mcsd.models.llama import grouped_query_attention
from mcsd.models.masks import layer_windows, make_masks
from mcsd.models.unmodified import is_unmodified

_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
"""Classes of transformers, and of `mcsd.models.llama`, whose computation the kernels reproduce."""

_SILU = {"SiLU", "SiLUActivation"}
"""Class names of the activation that the kernels compute, in torch and transformers."""

MAX_FUSED_TOKENS = 240
"""Tokens of a forward that runs as one call. For more, torch's attention is faster."""


class NativeNorm:
    """A root-mean-square norm.

    Args:
        norm: fused, or an identity, which is no norm.

    Attributes:
        struct: the norm for the kernels; it holds a pointer to a tensor of this object.
    """

    def __init__(self, norm: nn.Module) -> None:
        self._weight: Tensor | None = None
        self.struct = decoder.RMSNorm(None, -1.0)
        if not isinstance(norm, nn.Identity):
            assert isinstance(norm, FusedRMSNorm | PartsNorm)
            self._weight = None if norm.weight is None else norm.weight.detach().float()
            self.struct = decoder.RMSNorm(None if self._weight is None else self._weight.data_ptr(), norm.eps)


class NativeLayer:
    """One decoder layer.

    Args:
        layer: fused and packed, of a kind that `is_native` accepts, or of a draft head. The first layer of EAGLE-3 is
            given its input normalized, see `EagleLayer.split`.
    """

    def __init__(self, layer: Any) -> None:
        attention: FusedAttention = layer.self_attn
        self.heads, self.kv_heads, self.head_size = attention.heads, attention.kv_heads, attention.head_size
        self.scaling = attention.scaling
        mlp: FusedMLP = layer.mlp
        linears: Any = attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj
        self.linears: tuple[NativeLinear, ...] = linears
        self._tensors = [(linear.weight, linear.scale, linear.bias) for linear in self.linears]
        before = nn.Identity() if isinstance(layer, EagleLayer) else layer.input_layernorm
        norms = [before, layer.post_attention_layernorm, *(attention.norms or [nn.Identity()] * 2)]
        # The structs hold pointers to the tensors of these and of the linear layers.
        self._norms = [NativeNorm(norm) for norm in norms]
        input_norm, norm, *head_norms = (norm.struct for norm in self._norms)
        qkv, out, gate_up, down = (linear.struct() for linear in self.linears)
        self.struct = decoder.DecoderLayer(
            decoder.PreAttention(input_norm, qkv, *head_norms, self.heads, self.kv_heads, self.head_size),
            decoder.PostAttention(out, norm, gate_up, down),
            *(self.scaling, 0, False),
        )

    def pre_attention(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, projections and rotation: queries, keys and values ``[T, heads, size]``.

        Args:
            hidden: the layer's input ``[T, H]``, or ``[T, 2 H]`` for the first layer of EAGLE-3.
            cos, sin: angles of the tokens, ``[T, size]``.
        """
        tokens, dtype, struct = len(hidden), hidden.dtype, self.struct.pre_attention
        widths = (self.linears[0].in_features, self.head_size, self.head_size)
        parts = [readable(part, tokens, width, dtype) for part, width in zip((hidden, cos, sin), widths, strict=True)]
        out = hidden.new_empty(tokens, self.linears[0].out_features)
        call("pre_attention", struct, *parts, dtype, tokens, out)
        counts = [self.heads, self.kv_heads, self.kv_heads]
        queries, keys, values = out.view(tokens, -1, self.head_size).split_with_sizes(counts, dim=1)
        return queries, keys, values

    def post_attention(self, hidden: Tensor, attention: Tensor) -> Tensor:
        """Output projection, norm, MLP and residuals: the layer's output ``[T, H]``.

        Args:
            hidden: the residual ``[T, H]``, which is mostly the layer's input.
            attention: the attention output ``[T, heads * size]``.
        """
        tokens, dtype, struct = len(hidden), hidden.dtype, self.struct.post_attention
        hidden = readable(hidden, tokens, self.linears[1].out_features, dtype)
        out = torch.empty_like(hidden)
        attention = readable(attention, tokens, self.linears[1].in_features, dtype)
        call("post_attention", struct, hidden, attention, dtype, tokens, out)
        return out


class NativeLayers:
    """All decoder layers of a model and the norm after them.

    Args:
        model: a base model of transformers, fused and packed, that `is_native` accepts, or the decoder of a draft head.
        skips_first: whether tokens after the first one of a text do not attend to it.
    """

    def __init__(self, model: Any, skips_first: bool = False) -> None:
        self._layers = [NativeLayer(layer) for layer in model.layers]
        self._norm: nn.Module = model.norm
        self._native_norm = NativeNorm(model.norm)
        self._skips_first = skips_first
        self._rotary: FusedRotary = model.rotary_emb
        self._windows = layer_windows(model.config)
        self._positions: int = model.config.max_position_embeddings
        array = (decoder.DecoderLayer * len(self._layers))(*(layer.struct for layer in self._layers))
        for struct, window in zip(array, self._windows, strict=True):
            struct.sliding_window, struct.skips_first = window or 0, skips_first
        self.struct = decoder.Decoder(array, len(array), self._native_norm.struct)
        weight: Tensor = model.layers[0].post_attention_layernorm.weight
        self.hidden_size = len(weight)
        self.dtype: torch.dtype = weight.dtype
        first = self._layers[0]
        self._keys = weight.new_empty(0, first.kv_heads, 0, first.head_size)
        self.weights = nn.ModuleList([model.norm, *(linear for layer in self._layers for linear in layer.linears)])

    def __len__(self) -> int:
        return len(self._layers)

    @staticmethod
    def is_native(model: Any) -> bool:
        """Whether the kernels reproduce all layers of a base model, which is fused and packed already."""
        layers = list(getattr(model, "layers", ()))
        attentions = [layer.self_attn for layer in layers if _is_native_layer(layer)]
        return (
            len(attentions) == len(layers) > 0
            and [attention.layer for attention in attentions] == list(range(len(attentions)))
            and len({(one.heads, one.kv_heads, one.head_size) for one in attentions}) == 1
            and isinstance(model.norm, FusedRMSNorm)
            and isinstance(model.rotary_emb, FusedRotary)
            and is_unmodified(model)
        )

    def run(self, hidden: Tensor, layout: TokenLayout, view: CacheView, all_layers: bool = False) -> list[Tensor]:
        """Hidden states ``[B, n, H]``: the normalized output of the last layer.

        Args:
            hidden: the input of the first layer, ``[B, n, H]``.
            layout: of the in-flight tokens.
            view: of the cache, for these tokens.
            all_layers: return the input and the output of every layer too, as `ModelOutput` numbers them.
        """
        tokens = hidden.shape[0] * hidden.shape[1]
        hidden = readable(hidden, tokens, self.hidden_size, self.dtype)
        if tokens > MAX_FUSED_TOKENS:
            return self.run_each(hidden, layout, view, all_layers)
        last = torch.empty_like(hidden)
        outputs = hidden.new_empty(len(self), *hidden.shape) if all_layers else None
        call("decoder", self.struct, hidden, self.dtype, self.metadata(hidden, layout, view), outputs, last)
        return [last] if outputs is None else [hidden, *outputs.unbind()[:-1], last]

    def metadata(self, hidden: Tensor, layout: TokenLayout, view: CacheView) -> AttentionMetadata:
        """Where the tokens of a forward are, for the kernels.

        Raises:
            ValueError: the layout is not of these tokens, or is broken.
            IndexError: as `CacheView.store`.
        """
        if hidden.shape[:2] != (len(view.lengths), layout.new):
            raise ValueError(
                f"hidden states {tuple(hidden.shape)} for {layout.new} tokens of {len(view.lengths)} sequences"
            )
        store = view.store(self._keys)
        of_layer, of_values, of_sequence, of_head, *_ = store.stride()
        size = store.element_size()
        keys = store.data_ptr() + view.sequences.start * of_sequence * size
        # Positions are smaller than the number of slots.
        table = self._rotary.table(self._keys, min(view.columns, self._positions))
        metadata = AttentionMetadata(
            *(keys, keys + of_values * size, of_layer, of_sequence, of_head),
            *(len(view.lengths), layout.earlier, layout.new),
            *(view.lengths.data_ptr(), *(part.data_ptr() for part in layout.contiguous)),
            *(self._positions, *(part.data_ptr() for part in table)),
        )
        # The struct holds pointers to these.
        metadata.owners = store, view, layout, table
        return metadata

    def run_each(
        self, hidden: Tensor, layout: TokenLayout, view: CacheView, all_layers: bool = False, pair: Tensor | None = None
    ) -> list[Tensor]:
        """`run`, layer by layer.

        Args:
            hidden, layout, view, all_layers: as there.
            pair: what the attention of the first layer of EAGLE-3 reads, ``[B, n, 2 H]``; ``hidden`` is its residual.
        """
        window = next((window for window in self._windows if window), None)
        masks = make_masks(
            layout, view.lengths, view.columns, self.dtype, self._positions, window, skips_first=self._skips_first
        )
        batch, length, _ = hidden.shape
        table = self._rotary.table(hidden, min(view.columns, self._positions))
        cos, sin = table[:, masks.positions.flatten()]
        outputs = [hidden]
        for index, (layer, window) in enumerate(zip(self._layers, self._windows, strict=True)):
            flat = outputs[-1].flatten(0, 1)
            read = flat if pair is None or index else pair.flatten(0, 1)
            heads = layer.pre_attention(read, cos, sin)
            queries, keys, values = (part.view(batch, length, *part.shape[1:]) for part in heads)
            keys, values = view.update(keys.transpose(1, 2), values.transpose(1, 2), index)
            mask = masks.sliding if window else masks.full
            attention = grouped_query_attention(queries, keys, values, mask, layer.scaling)
            output = layer.post_attention(flat, attention.flatten(0, 1)).view_as(hidden)
            outputs = [*outputs, output] if all_layers else [output]
        return [*outputs[:-1], self._norm(outputs[-1])] if all_layers else [self._norm(outputs[-1])]


def _is_native_layer(layer: Any) -> bool:
    """Whether the kernels reproduce a decoder layer."""
    if type(layer).__name__ not in _LAYERS:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    norms = layer.input_layernorm, layer.post_attention_layernorm
    return (
        isinstance(attention, FusedAttention)
        and isinstance(mlp, FusedMLP)
        and type(mlp.activation).__name__ in _SILU
        and all(isinstance(norm, FusedRMSNorm) and norm.weight.dtype in DTYPES for norm in norms)
        and all(
            isinstance(linear, NativeLinear)
            for linear in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        )
    )
