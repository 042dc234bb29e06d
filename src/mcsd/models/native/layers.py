"""Linear layers and decoder layers that run in the kernels."""

import ctypes
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from mcsd.errors import UnsupportedModel
from mcsd.models.cache import CacheView
from mcsd.models.fusion import Attention, FeedForward, Norm
from mcsd.models.halves import run_halves
from mcsd.models.native.library import library
from mcsd.models.product import Product
from mcsd.models.quantization import GROUP, round_in_groups, round_weight

_BLOCK = 32
"""Outputs of a block of weights."""

_FILLED = 16
"""Inputs of bytes are filled up to a multiple of this."""

_ROUNDED = 16
"""Blocks of weights that are rounded to half bytes together."""

_MOST_INPUTS = 2**16
"""With more, sums of bytes would not fit into 32 bits."""

_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
"""Classes of transformers that are known to do what the kernels do with a layer's parts."""

_DTYPES = (torch.float32, torch.bfloat16)
"""What the kernels read and write."""


_SILU = {"SiLU", "SiLUActivation"}
"""Names of what the kernels' gate is, in torch and transformers."""


class Kind(IntEnum):
    """What a weight is kept as, and states are multiplied as."""

    BYTES = 0
    """Both a byte: see `mcsd.models.quantization`."""
    FINE_BYTES = 1
    """The weight a byte, states two."""
    BFLOAT16 = 2
    """The weight bfloat16; sums and states are float32."""
    NIBBLES = 3
    """The weight half a byte, a state a byte: see `mcsd.models.quantization.round_in_groups`."""


_MOST_TOKENS = 240
"""Tokens of a forward that go through a layer in one call; of more the attention is torch's, which is made for them."""


class _Linear(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("kind", ctypes.c_int64),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("eps", ctypes.c_double))


class _Before(ctypes.Structure):
    _fields_ = (
        ("norm", _Norm),
        ("into", _Linear),
        ("queries", _Norm),
        ("keys", _Norm),
        ("heads", ctypes.c_int64),
        ("shared", ctypes.c_int64),
        ("size", ctypes.c_int64),
    )


class _Behind(ctypes.Structure):
    _fields_ = (("out", _Linear), ("norm", _Norm), ("into", _Linear), ("down", _Linear))


class _Layer(ctypes.Structure):
    _fields_ = (("before", _Before), ("behind", _Behind), ("scaling", ctypes.c_double))


class _Place(ctypes.Structure):
    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("starts", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
    )


class NativeLinear(Product):
    """A linear layer in our own kernels.

    Args:
        linear: the layer, in any dtype; its weight may be freed afterwards.
        kind: what its weight is kept as.
        rounded: what `round_weight` makes of its weight, which is not read then; of weights that are bytes.
    """

    least_rows = 1

    def __init__(self, linear: nn.Linear, kind: Kind, rounded: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__(len(linear.weight))
        self.inputs = linear.weight.shape[1]
        if self.inputs > _MOST_INPUTS:
            raise UnsupportedModel(
                f"a linear layer has {self.inputs} inputs, and {_MOST_INPUTS} is the most", "leave quantize out"
            )
        self.kind = kind
        self.scale: Tensor | None = None
        if kind is Kind.BFLOAT16:
            self.weight = _blocks_of_halves(linear.weight.detach().to(torch.bfloat16))
        elif kind is Kind.NIBBLES:
            self.weight = _blocks_of_nibbles(linear.weight.detach())
        else:
            codes, self.scale = round_weight(linear.weight) if rounded is None else rounded
            self.weight = _blocks_of_bytes(codes)
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, states: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, in the states' dtype."""
        return self.product(states)

    def multiply(self, states: Tensor) -> Tensor:
        """See `Product.multiply`."""
        if states.dtype not in _DTYPES:
            return self.multiply(states.float()).to(states.dtype)
        out = states.new_empty(len(states), self.outputs)
        _call("product", self.described(), out, (states, self.inputs))
        return out

    def described(self) -> _Linear:
        """This layer as the kernels know it; it holds pointers to its weights."""
        scale, bias = (None if part is None else part.data_ptr() for part in (self.scale, self.bias))
        return _Linear(self.weight.data_ptr(), scale, bias, self.inputs, self.outputs, self.kind)

    def dense(self) -> Tensor:
        """See `Product.dense`."""
        if self.kind is Kind.BFLOAT16:
            pairs = self.weight.flatten().view(torch.bfloat16).view(-1, self.inputs, _BLOCK // 2, 2)
            return pairs.permute(0, 3, 2, 1).reshape(-1, self.inputs)[: self.outputs]
        if self.kind is Kind.NIBBLES:
            numbers = self.weight[..., :_BLOCK].contiguous().view(torch.float16).view(*self.weight.shape[:2], 2, _BLOCK)
            step, least = numbers.float().permute(2, 0, 3, 1)[..., None]
            both = self.weight[..., _BLOCK:].contiguous().view(torch.uint8).view(*self.weight.shape[:2], -1, 16, 4)
            codes = torch.stack([both & 15, both >> 4], dim=3).permute(0, 3, 4, 1, 2, 5).flatten(4).flatten(1, 2)
            return codes.float().mul_(step).add_(least).flatten(2).flatten(0, 1)[: self.outputs, : self.inputs]
        assert self.scale is not None
        fours = self.weight.flatten().view(torch.uint8).view(len(self.weight), -1, _BLOCK, 4)
        codes = fours.transpose(1, 2).flatten(2).flatten(0, 1)
        return codes[: self.outputs, : self.inputs].float().sub_(128) * self.scale[:, None]


def replace_layers(network: nn.Module) -> None:
    """Let the decoder layers of which all is known run in the kernels; their linear layers are native already."""
    for module in network.modules():
        layer: Any = module
        if type(layer).__name__ in _LAYERS and _is_known(layer):
            layer.forward = _DecoderLayer(layer)


def _is_known(layer: Any) -> bool:
    """Whether the kernels compute what a layer's parts do."""
    attention, block = layer.self_attn, layer.mlp
    norms = layer.input_layernorm, layer.post_attention_layernorm
    return (
        isinstance(attention, Attention)
        and isinstance(block, FeedForward)
        and type(block.activation).__name__ in _SILU
        and all(isinstance(norm, Norm) and norm.weight.dtype in _DTYPES for norm in norms)
        and all(isinstance(each, NativeLinear) for each in (attention.into, attention.out, block.into, block.out))
    )


class _DecoderLayer:
    """The forward of a decoder layer."""

    def __init__(self, layer: Any) -> None:
        attention, block = layer.self_attn, layer.mlp
        self._attention: Attention = attention
        self._index = attention.layer
        # What the kernels have pointers to must outlive them, whatever becomes of the layer.
        self._kept: list[Tensor | None] = []
        own = [self._norm(each) for each in attention.norms or ()] or [_Norm(), _Norm()]
        self._counts = attention.query_heads, attention.key_heads, attention.head_size
        norm, later = self._norm(layer.input_layernorm), self._norm(layer.post_attention_layernorm)
        before = _Before(norm, self._linear(attention.into), *own, *self._counts)
        behind = _Behind(self._linear(attention.out), later, self._linear(block.into), self._linear(block.out))
        self._layer = _Layer(before, behind, attention.scaling)
        self._like = layer.input_layernorm.weight.new_empty(0, attention.key_heads, 0, attention.head_size)

    def _norm(self, norm: Norm) -> _Norm:
        weight = norm.weight.detach().float()
        self._kept.append(weight)
        return _Norm(weight.data_ptr(), norm.eps)

    def _linear(self, linear: NativeLinear) -> _Linear:
        self._kept += [linear.weight, linear.scale, linear.bias]
        return linear.described()

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        **unused: Any,
    ) -> Tensor:
        """See ``LlamaDecoderLayer.forward``; the angles are a `Rotary`'s."""
        rows, length, width = hidden_states.shape
        if not isinstance(past_key_values, CacheView) or attention_mask is None or rows * length > _MOST_TOKENS:
            halves = self._before, self._behind, self._attention
            return run_halves(*halves, hidden_states, attention_mask, position_embeddings, past_key_values)
        store, first, starts, columns = past_key_values.place(self._like, self._index)
        _, of_values, of_row, of_head, *_ = store.stride()
        keys = store.data_ptr() + (2 * self._index * of_values + first * of_row) * store.element_size()
        mask = attention_mask.contiguous()
        if mask.shape != (rows, 1, length, columns) or not mask.dtype == store.dtype == hidden_states.dtype:
            raise ValueError(f"a mask {tuple(mask.shape)} of {mask.dtype} for {rows} x {length} tokens")
        place = _Place(
            *(keys, keys + of_values * store.element_size(), of_row, of_head, starts.data_ptr()),
            *(rows, length, columns, mask.data_ptr()),
        )
        out = torch.empty(hidden_states.shape, dtype=hidden_states.dtype)
        # All rows may have the same positions.
        together = (part if len(part) == rows else part.expand(rows, -1, -1, -1) for part in position_embeddings)
        angles = ((part, self._counts[2]) for part in together)
        _call("layer", self._layer, out, (hidden_states, width), *angles, last=ctypes.byref(place))
        return out

    def _before(self, states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, shared, size = self._counts
        layer = self._layer.before
        out = states.new_empty(len(states), layer.into.outputs)
        _call("before", layer, out, (states, layer.into.inputs), (cos, size), (sin, size))
        queries, keys, values = out.view(len(out), -1, size).split_with_sizes([heads, shared, shared], dim=1)
        return queries, keys, values

    def _behind(self, states: Tensor, seen: Tensor) -> Tensor:
        out = torch.empty_like(states, memory_format=torch.contiguous_format)
        layer = self._layer.behind
        _call("behind", layer, out, (states, layer.out.outputs), (seen, layer.out.inputs))
        return out


def _call(entry: str, layer: ctypes.Structure, out: Tensor, *inputs: tuple[Tensor, int], last: Any = None) -> None:
    """Fill ``out`` with what a kernel makes of its inputs.

    Args:
        entry: its name.
        layer: what it knows of the layer.
        out: contiguous, ``[..., outputs]``, a row a token.
        inputs: tensors and how many numbers the kernel reads of each for a token.
        last: where the tokens stand; if it is not said, the kernel is told their number.

    Raises:
        ValueError: a tensor is not of this size, or not of the dtype of the others.
    """
    tokens = out.shape[:-1].numel()
    parts = [part.contiguous() for part, _ in inputs]
    for part, (_, width) in zip(parts, inputs, strict=True):
        if part.numel() != tokens * width or part.dtype != out.dtype or part.dtype not in _DTYPES:
            found = f"{tuple(part.shape)} of {part.dtype}"
            raise ValueError(f"for {tokens} tokens there must be {width} numbers of {out.dtype} each, not {found}")
    getattr(library(), entry)(
        *(ctypes.byref(layer), *(ctypes.c_void_p(part.data_ptr()) for part in parts)),
        *(ctypes.c_bool(out.dtype == torch.bfloat16), ctypes.c_int64(tokens) if last is None else last),
        *(ctypes.c_void_p(out.data_ptr()), ctypes.c_int(torch.get_num_threads())),
    )


def _blocks_of_bytes(codes: Tensor) -> Tensor:
    """Codes int8 ``[out, in]``, moved to be unsigned, as int32 ``[blocks, in / 4, 32]`` of four inputs each."""
    rows, columns = len(codes), codes.shape[1]
    filled = nn.functional.pad(codes, (0, -columns % _FILLED, 0, -rows % _BLOCK))
    fours = filled.view(torch.uint8).bitwise_xor(128).view(torch.int32)
    return fours.view(-1, _BLOCK, fours.shape[1]).transpose(1, 2).contiguous()


def _blocks_of_halves(weight: Tensor) -> Tensor:
    """bfloat16 ``[out, in]`` as int32 ``[blocks, in, 16]``, each the outputs i and i + 16 of the block."""
    filled = nn.functional.pad(weight, (0, 0, 0, -len(weight) % _BLOCK))
    pairs = filled.view(-1, 2, _BLOCK // 2, filled.shape[1])
    together = torch.stack([pairs[:, 0].transpose(1, 2), pairs[:, 1].transpose(1, 2)], dim=-1)
    return together.flatten().view(torch.int32).view(together.shape[:-1])


def _blocks_of_nibbles(weight: Tensor) -> Tensor:
    """A weight ``[out, in]`` as int32 ``[blocks, groups, 160]``: steps, least numbers, codes."""
    filled = nn.functional.pad(weight, (0, -weight.shape[1] % GROUP, 0, -len(weight) % _BLOCK)).contiguous()
    groups = filled.shape[1] // GROUP
    blocks = torch.empty(len(filled) // _BLOCK, groups, _BLOCK + _BLOCK * GROUP // 8, dtype=torch.int32)
    # Some blocks at a time, which stay in the processor's cache.
    for start in range(0, len(blocks), _ROUNDED):
        some, rows = blocks[start : start + _ROUNDED], filled[start * _BLOCK : (start + _ROUNDED) * _BLOCK]
        codes, step, least = round_in_groups(rows)
        numbers = torch.stack([step, least]).view(2, -1, _BLOCK, groups).permute(1, 3, 0, 2)
        some[..., :_BLOCK] = numbers.flatten().view(torch.int32).view(-1, groups, _BLOCK)
        # Two outputs a byte, four inputs together.
        fours = codes.view(torch.int32).view(-1, 2, _BLOCK // 2, groups, GROUP // 4)
        both = fours[:, 0] | fours[:, 1] << 4
        some[..., _BLOCK:] = both.permute(0, 2, 3, 1).flatten(2)
    return blocks
