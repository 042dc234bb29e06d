"""Fewer and larger operations for the decoder layers of the Llama kind: what they compute stays, its rounding apart.

The few tokens of a tree are so little work that a layer's time goes into the number of its operations. So projections
of the same input become one product, queries and keys are rotated together, and the heads that share keys and values
are rows of one product instead of copies of them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}
_FEEDFORWARDS = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"}
_ATTENTIONS = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
_ROTARIES = {"LlamaRotaryEmbedding", "MistralRotaryEmbedding", "Qwen2RotaryEmbedding", "Qwen3RotaryEmbedding"}
"""Classes of transformers that are known to compute just this."""

_MOVING = {"dynamic", "longrope"}
"""Kinds of rotation that change with the length of the text."""

_POSITIONS = 1024
"""Angles are kept for twice as many positions, or twice those of the longest text."""


def fuse(network: nn.Module) -> None:
    """Replace what is known inside a network in place, with its own weights; what is not known stays as it is."""
    for module in list(network.modules()):
        rotary: Any = getattr(module, "rotary_emb", None)
        if type(rotary).__name__ in _ROTARIES and rotary.rope_type not in _MOVING:
            module.rotary_emb = Rotary(rotary)
            _replace(module, _ATTENTIONS, Attention)
    _replace(network, _NORMS, Norm)
    _replace(network, _FEEDFORWARDS, FeedForward)


def _replace(network: nn.Module, names: set[str], fused: Callable[[Any], nn.Module]) -> None:
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ in names:
                setattr(parent, name, fused(child))


class Rotary(nn.Module):
    """Cosine and sine of each position, kept from one forward to the next.

    The first half of the sine's entries is negative: what is added to a head is its other half, turned round.
    """

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self._rotary = rotary
        self._table: Tensor | None = None

    def forward(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Both ``[B, n, 1, size]``, in the states' dtype, for positions ``[B, n]``."""
        cos, sin = self.table(states, int(position_ids.max()) + 1)[:, position_ids, None].unbind()
        return cos, sin

    def table(self, states: Tensor, longest: int) -> Tensor:
        """Both ``[2, positions, size]``, in the states' dtype, for ``longest`` positions or more."""
        if self._table is None or longest > self._table.shape[1] or states.dtype != self._table.dtype:
            every = torch.arange(max(longest, _POSITIONS) * 2, device=states.device)
            self._table = torch.cat(self._rotary(states, position_ids=every[None]))
            self._table[1, :, : self._table.shape[2] // 2].neg_()
        return self._table


class Norm(nn.Module):
    """A root-mean-square norm, as one operation."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self._size = tuple(norm.weight.shape)
        self.eps: float = norm.variance_epsilon

    def forward(self, states: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``."""
        return nn.functional.rms_norm(states, self._size, self.weight, self.eps)


class FeedForward(nn.Module):
    """A gated feed-forward block; gate and input are one product."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.into = _joined(block.gate_proj, block.up_proj)
        self.out = block.down_proj
        self.activation = block.act_fn

    def forward(self, states: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``."""
        gate, value = self.into(states).chunk(2, dim=-1)
        out: Tensor = self.out(self.activation(gate).mul_(value))
        return out


class Attention(nn.Module):
    """Attention with rotated positions (Su et al. 2021); queries, keys and values are one product."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.into = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = attention.o_proj
        self.norms = nn.ModuleList([attention.q_norm, attention.k_norm]) if hasattr(attention, "q_norm") else None
        self.layer: int = attention.layer_idx
        self.head_size: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.query_heads = attention.q_proj.out_features // self.head_size
        self.key_heads = attention.k_proj.out_features // self.head_size

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """See ``LlamaAttention.forward``; the angles are a `Rotary`'s."""
        heads = self.heads(hidden_states, *position_embeddings)
        return self.out(self.attend(*heads, attention_mask, past_key_values)), None

    def heads(self, states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[B, n, heads, size]`` of states ``[B, n, H]``, rotated by their positions."""
        heads: Tensor = self.into(states)
        heads = heads.view(*states.shape[:-1], -1, self.head_size)
        turned, values = heads.split_with_sizes([self.query_heads + self.key_heads, self.key_heads], dim=-2)
        if self.norms is not None:
            queries, keys = turned.split_with_sizes([self.query_heads, self.key_heads], dim=-2)
            turned = torch.cat([self.norms[0](queries), self.norms[1](keys)], dim=-2)
        turned = torch.addcmul(turned * cos, turned.roll(self.head_size // 2, dims=-1), sin)
        queries, keys = turned.split_with_sizes([self.query_heads, self.key_heads], dim=-2)
        return queries, keys, values

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """What the queries see ``[B, n, heads * size]`` of the cache, if there is one, and the new keys and values.

        Without a mask, each sees what comes before it.
        """
        rows, length = queries.shape[:2]
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer)
        # The queries that share keys are rows of one product: [B, shared, each * n, size].
        each = self.query_heads // self.key_heads
        queries = queries.reshape(rows, length, self.key_heads, each, self.head_size).permute(0, 2, 3, 1, 4)
        if length > 1:
            if mask is None:
                columns = keys.shape[2]
                mask = torch.ones(1, 1, length, columns, dtype=torch.bool, device=keys.device).tril(columns - length)
            mask = mask.expand(rows, each, -1, -1).reshape(rows, 1, each * length, -1)
        seen = nn.functional.scaled_dot_product_attention(
            queries.reshape(rows, self.key_heads, each * length, self.head_size),
            keys,
            values,
            attn_mask=mask,
            scale=self.scaling,
        )
        return seen.view(rows, self.query_heads, length, self.head_size).transpose(1, 2).flatten(2)


def _joined(*linears: nn.Linear) -> nn.Linear:
    """One linear layer that gives the outputs of several, one behind the other."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(biases), device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if biases:
        joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return joined
