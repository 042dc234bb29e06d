"""Weights in the layout that the CPU's bfloat16 matrix kernels want, so that no forward has to reorder them."""

from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 16
"""Rows of the products that the layout is chosen for: about one tree."""


class PackedLinear(nn.Module):
    """A linear layer on oneDNN's own weight layout; computes what ``nn.Linear`` does, in bfloat16.

    Args:
        linear: the layer; its weight may be freed afterwards.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(states, self.weight, self.bias, "none", [], "")
        return out


def packable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine has bfloat16 kernels with a layout of their own."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack(model: Any) -> None:
    """Replace the linear layers of a model in place, one by one, freeing each weight.

    A matrix that is tied to the embedding stays: packing it would keep it in memory twice.
    """
    shared = {id(model.get_input_embeddings().weight)}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and id(child.weight) not in shared:
                setattr(parent, name, PackedLinear(child))
