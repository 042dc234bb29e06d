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

    def _attend(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        if not isinstance(cache, CacheView) or mask is None or hidden.shape[1] > MAX_TOKENS:
            return super()._attend(hidden, cos, sin, mask, cache)
        if self.norms is not None:
            queries, keys, values = self._project(hidden, cos, sin)
            keys, values = cache.update(keys, values, self.layer)
        else:
            qkv = self.qkv_proj(hidden)
            keys, values = cache.layer(self.layer, self._like(qkv))
            queries = triton_kernels.rotate_and_store(
                qkv, cos, sin, keys, values, cache.slots, self.heads, self.kv_heads
            )
        return triton_kernels.tree_attention(queries, keys, values, mask, cache.lengths, cache.in_flight, self.scaling)

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
