"""Linear layers and embeddings whose weights stay as they are in a GGUF file; ``kernels/gguf.h`` has the arithmetic."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mcsd.cpu.native_linear import NativeLinear
from mcsd.errors import UnsupportedModel
from mcsd.kernels import WeightFormat, call

_GROUP = 32


@dataclass(frozen=True)
class GgufTensor:
    """A quantized matrix of a GGUF file, mapped into memory.

    Attributes:
        data: uint8, the bytes of the matrix.
        type: the number of its type in ggml, one of those in ``kernels/gguf_types.h``.
        outputs, inputs: its shape; the inputs are whole blocks of the type.
        rope_size: of the heads, if their rows are in the order of rotated pairs, as Llama files have them: 0, size / 2,
            1, size / 2 + 1 and so on; else 0.
    """

    data: Tensor
    type: int
    outputs: int
    inputs: int
    rope_size: int = 0

    def rows(self, indices: Tensor) -> Tensor:
        """Rows of the file, float32 ``[*, inputs]``, by their indices.

        Raises:
            IndexError: there is no such row.
        """
        indices = indices.long().contiguous()
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.outputs:
            raise IndexError(f"rows {int(indices.min())} to {int(indices.max())} of a matrix of {self.outputs}")
        out = torch.empty(*indices.shape, self.inputs, dtype=torch.float32, device=indices.device)
        call("gguf_rows", self.data, self.type, self.inputs, indices, indices.numel(), out)
        return out

    def dense(self) -> Tensor:
        """float32 ``[outputs, inputs]``, in the order of the network."""
        indices = torch.arange(self.outputs, device=self.data.device)
        if self.rope_size:
            indices = indices.view(-1, self.rope_size // 2, 2).transpose(1, 2).flatten()
        return self.rows(indices)


class GgufLinear(NativeLinear):
    """A linear layer of one or more matrices of a GGUF file, their outputs one after the other.

    Args:
        tensors: the matrices, with the same inputs.
        bias: ``[out]`` or None.
    """

    def __init__(self, tensors: Sequence[GgufTensor], bias: Tensor | None) -> None:
        structs = [[one.data.data_ptr(), one.outputs, one.type, one.rope_size] for one in tensors]
        weight = torch.tensor(structs, dtype=torch.int64, device=tensors[0].data.device)
        outputs = sum(one.outputs for one in tensors)
        super().__init__(outputs, tensors[0].inputs, WeightFormat.GGUF, weight, bias=bias)
        self.tensors = tuple(tensors)
        for i, one in enumerate(tensors):
            # Whoever counts a model's weights counts these.
            self.register_buffer(f"data{i}", one.data, persistent=False)

    def __deepcopy__(self, memo: Any) -> "GgufLinear":
        # The structs of a copied weight would point to the matrices of this layer.
        return GgufLinear([deepcopy(one, memo) for one in self.tensors], deepcopy(self.bias, memo))

    @classmethod
    def quantized(cls, linear: nn.Linear) -> "GgufLinear":
        """A linear layer of torch with its weights rounded to Q8_0: int8 with a scale for each 32 inputs.

        Raises:
            UnsupportedModel: its inputs are not whole groups of 32.
        """
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        outputs, inputs = linear.weight.shape
        if inputs % _GROUP:
            raise UnsupportedModel(
                f"a linear layer of a draft has {inputs} inputs, which is no multiple of {_GROUP}",
                "choose another draft, or give target and draft as objects",
            )
        kind = GGMLQuantizationType.Q8_0
        blocks = torch.from_numpy(quantize(linear.weight.detach().float().numpy(), kind))
        return cls([GgufTensor(blocks, int(kind), outputs, inputs)], linear.bias)

    def dense(self) -> Tensor:
        """See `PackedLinear.dense`."""
        return torch.cat([one.dense() for one in self.tensors])

    def dense_rows(self, rows: Tensor) -> Tensor:
        """See `PackedLinear.dense_rows`."""
        return (
            self.tensors[0].rows(rows)
            if len(self.tensors) == 1 and not self.tensors[0].rope_size
            else super().dense_rows(rows)
        )


class GgufEmbedding(nn.Module):
    """Token embeddings in a GGUF file.

    Args:
        tensor: ``[V, H]``.
        dtype: of the embeddings.
    """

    def __init__(self, tensor: GgufTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.tensor, self.dtype = tensor, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """``[*, H]`` of token ids."""
        return self.tensor.rows(tokens).to(self.dtype)

    def dense(self) -> Tensor:
        """float32 ``[V, H]``."""
        return self.tensor.dense()

    def dense_rows(self, rows: Tensor) -> Tensor:
        """Rows of `dense` by their numbers ``[n]``."""
        return self.tensor.rows(rows)
