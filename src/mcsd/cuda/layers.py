"""Fused decoder layers for CUDA cards: the modules of `mcsd.models.fusion` with our Triton kernels."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mcsd.cuda import triton_kernels
from mcsd.models.fusion import FusedAttention, FusedMLP, FusedRMSNorm, FusedRotary, fuse
from mcsd.models.kv_cache import CacheView

MAX_TOKENS = 128
"""Tokens of a sequence up to which our attention runs: those of a tree. Longer ones are prefills."""

_SILUS = {"SiLU", "SiLUActivation"}


def fuse_for_cuda(network: nn.Module) -> None:
    """Fuse known, unmodified modules of a network on a CUDA card in place; others stay as they are."""
    kernels = triton_kernels.is_available(next(network.parameters()).device)
    attention, mlp = (TritonAttention, TritonMLP) if kernels else (FusedAttention, FusedMLP)
    fuse(network, rotary=CudaRotary, attention=attention, norm=FusedRMSNorm, mlp=mlp)


def fused_copy(network: Any) -> Any:
    """A fused copy that shares its weights with a network. What the network computes does not change.

    Fused layers join weights in new tensors, of which the network's own become parts. If the network is moved later,
    the copy stays where it is.
    """
    shared = {parameter: nn.Parameter(parameter.detach(), requires_grad=False) for parameter in network.parameters()}
    copied = copy.deepcopy(network, {id(own): other for own, other in shared.items()})
    fuse_for_cuda(copied)
    for own, other in shared.items():
        own.data = other.data
    return copied


class CudaRotary(FusedRotary):
    """Rotary embeddings that are computed in every forward: a table would need the longest position on the host."""

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """See `FusedRotary.forward`."""
        cos, sin = self._rotary(hidden, position_ids=position_ids)
        first, second = sin.chunk(2, dim=-1)
        return cos[:, :, None], torch.cat([-first, second], dim=-1)[:, :, None]


class TritonAttention(FusedAttention):
    """Fused attention that reads the keys and values of a sequence up to its own length, in one pass."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Any = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """See `FusedAttention.forward`."""
        view = past_key_values if cache is None else cache
        if not isinstance(view, CacheView) or attention_mask is None or hidden_states.shape[1] > MAX_TOKENS:
            return super().forward(hidden_states, position_embeddings, attention_mask, view)
        cos, sin = position_embeddings
        if self.norms is not None:
            queries, new_keys, new_values = self._project(hidden_states, cos, sin)
            keys, values = view.update(new_keys, new_values, self.layer)
        else:
            qkv = self.qkv_proj(hidden_states)
            keys, values = view.layer(self.layer, self._like(qkv))
            queries = triton_kernels.rotate_and_store(
                qkv, cos, sin, keys, values, view.slots, self.heads, self.kv_heads
            )
        out = triton_kernels.tree_attention(
            queries, keys, values, attention_mask, view.lengths, view.in_flight, self.scaling
        )
        return self.o_proj(out), None

    def _like(self, qkv: Tensor) -> Tensor:
        """An empty tensor in the shape and dtype of keys."""
        return qkv.new_empty(len(qkv), self.kv_heads, 0, self.head_size)


class TritonMLP(FusedMLP):
    """A fused gated MLP whose activation and product are one kernel, if it is SiLU."""

    def __init__(self, mlp: Any) -> None:
        super().__init__(mlp)
        self._is_silu = type(self.activation).__name__ in _SILUS

    def forward(self, hidden: Tensor) -> Tensor:
        """See `FusedMLP.forward`."""
        if not self._is_silu:
            return super().forward(hidden)
        out: Tensor = self.down_proj(triton_kernels.gated_silu(self.gate_up_proj(hidden)))
        return out
