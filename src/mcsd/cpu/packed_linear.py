"""The base of packed linear layers: layers whose weight is kept in the layout of one library's kernels."""

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer whose weight only its own `multiply` can read.

    Args:
        out_features: of the layer.
        weight: in the library's layout.
        bias: ``[out]`` or None.
    """

    min_rows = 4
    """Inputs with fewer rows are padded to this: oneDNN takes 12 to 15 % longer for one or two rows than for four."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, out_features: int, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features = out_features
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def multiply(self, activations: Tensor) -> Tensor:
        """``[M, in]`` to ``[M, out]``."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The weight ``[out, in]``; float32 if it is quantized."""
        raise NotImplementedError

    def dense_rows(self, rows: Tensor) -> Tensor:
        """Rows of `dense` by their numbers ``[n]``."""
        return self.dense()[rows]

    def multiply_all(self, activations: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        rows = activations.flatten(0, -2)
        count = len(rows)
        if 0 < count < self.min_rows:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, self.min_rows - count))
        return self.multiply(rows)[:count].view(*activations.shape[:-1], self.out_features)
