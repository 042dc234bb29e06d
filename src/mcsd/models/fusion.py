"""Fused modules for decoder layers of the Llama kind: the same computation in fewer and larger operations.

With the few tokens of a tree, the time of a layer is the number of its operations. So projections of the same input
become one matrix product, queries and keys are rotated together, and query heads that share keys and values are rows of
one product instead of copies of keys and values.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mcsd.models.llama import grouped_query_attention
from mcsd.models.unmodified import is_plain_linear, is_unmodified

_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}
_MLPS = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"}
_ATTENTIONS = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
_ROTARIES = {"LlamaRotaryEmbedding", "MistralRotaryEmbedding", "Qwen2RotaryEmbedding", "Qwen3RotaryEmbedding"}
"""Classes of transformers, and of `mcsd.models.llama`, whose computation these modules reproduce."""

_LENGTH_DEPENDENT = {"dynamic", "longrope"}
"""Kinds of RoPE whose angles depend on the length of the text."""

_MIN_POSITIONS = 1024
"""The table of angles holds twice this, or twice the longest text."""


def fuse(
    network: nn.Module,
    rotary: "type[FusedRotary] | None" = None,
    attention: "type[FusedAttention] | None" = None,
    norm: "type[FusedRMSNorm] | None" = None,
    mlp: "type[FusedMLP] | None" = None,
) -> None:
    """Replace known, unmodified modules of a network in place, with the same weights; others stay as they are.

    Args:
        network: any network.
        rotary, attention, norm, mlp: the classes of the fused modules; by default those of this file.
    """
    for module in list(network.modules()):
        angles: Any = getattr(module, "rotary_emb", None)
        known = type(angles).__name__ in _ROTARIES and angles.rope_type not in _LENGTH_DEPENDENT
        attentions = [child for child in module.modules() if type(child).__name__ in _ATTENTIONS]
        # Fused attention needs angles of the fused kind, and the other way round: all of them or none.
        if known and is_unmodified(angles) and all(map(_can_fuse_attention, attentions)):
            module.rotary_emb = (rotary or FusedRotary)(angles)
            _replace(module, _ATTENTIONS, attention or FusedAttention)
    _replace(network, _NORMS, norm or FusedRMSNorm)
    _replace(network, _MLPS, mlp or FusedMLP)


def _can_fuse_attention(attention: Any) -> bool:
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return is_unmodified(attention) and all(map(is_plain_linear, projections))


def _can_fuse(module: Any) -> bool:
    linears = [child for name, child in module.named_children() if name in ("gate_proj", "up_proj")]
    return is_unmodified(module) and all(map(is_plain_linear, linears))


def _replace(network: nn.Module, names: set[str], fused: Callable[[Any], nn.Module]) -> None:
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ in names and _can_fuse(child):
                setattr(parent, name, fused(child))


class FusedRotary(nn.Module):
    """Rotary embeddings (Su et al. 2021) from a table of cosines and sines that is kept between forwards.

    The first half of each row of sines is negated, so rotation adds the rolled head times the sines.
    """

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self._rotary = rotary
        self._table: Tensor | None = None

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[B, n, 1, size]`` in the dtype of ``hidden``, for positions ``[B, n]``."""
        cos, sin = self.table(hidden, int(position_ids.max()) + 1)[:, position_ids, None].unbind()
        return cos, sin

    def table(self, hidden: Tensor, positions: int) -> Tensor:
        """Cosines and sines ``[2, positions or more, size]`` in the dtype of ``hidden``."""
        if self._table is None or positions > self._table.shape[1] or hidden.dtype != self._table.dtype:
            ids = torch.arange(max(positions, _MIN_POSITIONS) * 2, device=hidden.device)
            table = torch.cat(self._rotary(hidden, position_ids=ids[None]))
            table[1, :, : table.shape[2] // 2].neg_()
            self._table = table
        return self._table


class FusedRMSNorm(nn.Module):
    """A root-mean-square norm as one operation."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self._size = tuple(norm.weight.shape)
        self.eps: float = norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``."""
        return nn.functional.rms_norm(hidden, self._size, self.weight, self.eps)


class FusedMLP(nn.Module):
    """A gated MLP; gate and up projection are one matrix product."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up_proj = _concatenated(mlp.gate_proj, mlp.up_proj)
        self.down_proj = mlp.down_proj
        self.activation = mlp.act_fn

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``."""
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        out: Tensor = self.down_proj(self.activation(gate).mul_(up))
        return out


class FusedAttention(nn.Module):
    """Attention with rotary embeddings; queries, keys and values are one matrix product."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv_proj = _concatenated(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = attention.o_proj
        self.norms = nn.ModuleList([attention.q_norm, attention.k_norm]) if hasattr(attention, "q_norm") else None
        self.layer: int = attention.layer_idx
        self.head_size: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.heads = attention.q_proj.out_features // self.head_size
        self.kv_heads = attention.k_proj.out_features // self.head_size

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Any = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """See ``LlamaAttention.forward``; the angles are a `FusedRotary`'s.

        The cache was named ``past_key_values`` before transformers 5.24.
        """
        cache = past_key_values if cache is None else cache
        return self.o_proj(self._attend(hidden_states, *position_embeddings, attention_mask, cache)), None

    def _attend(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """The attention ``[B, n, heads * size]`` before the output projection."""
        queries, keys, values = self._project(hidden, cos, sin)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer)
        return grouped_query_attention(queries, keys, values, mask, self.scaling)

    def _project(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries ``[B, n, heads, size]``, rotated keys and values ``[B, kv heads, n, size]``."""
        heads = self.qkv_proj(hidden).view(*hidden.shape[:-1], -1, self.head_size)
        rotated, values = heads.split_with_sizes([self.heads + self.kv_heads, self.kv_heads], dim=-2)
        if self.norms is not None:
            queries, keys = rotated.split_with_sizes([self.heads, self.kv_heads], dim=-2)
            rotated = torch.cat([self.norms[0](queries), self.norms[1](keys)], dim=-2)
        rotated = torch.addcmul(rotated * cos, rotated.roll(self.head_size // 2, dims=-1), sin)
        queries, keys = rotated.split_with_sizes([self.heads, self.kv_heads], dim=-2)
        return queries, keys.transpose(1, 2), values.transpose(1, 2)


def _concatenated(*linears: nn.Linear) -> nn.Linear:
    """One linear layer whose outputs are those of several, concatenated. Their weights become parts of its weight."""
    weights = [linear.weight.detach() for linear in linears]
    # Concatenating on the meta device would import torch's compiler.
    outputs = sum(map(len, weights))
    weight = weights[0].new_empty(outputs, weights[0].shape[1]) if weights[0].is_meta else torch.cat(weights)
    parts = torch.split(weight, [linear.out_features for linear in linears])
    for linear, part in zip(linears, parts, strict=True):
        linear.weight.data = part
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(biases), device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if biases:
        joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return joined
