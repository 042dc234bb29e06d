"""Linear layers and embeddings whose weights are those of a GGUF file; ``kernels/gguf.h`` has the arithmetic."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mcsd.cpu.native_linear import NativeLinear
from mcsd.errors import UnsupportedModel
from mcsd.kernels import WeightFormat, call
from mcsd.kernels.huge_pages import zeros

_GROUP = 32
"""Inputs of a block of Q8_0."""

_ROWS = 16
"""Rows of a packed block."""

_Q4_0, _Q4_1, _Q4_K = 2, 3, 12
_FOUR_BITS = {_Q4_0, _Q4_1, _Q4_K}
"""Types of ggml with four to five bits a weight."""


@dataclass(frozen=True)
class GgufTensor:
    """A quantized matrix as a GGUF file has it.

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

    def packed(self) -> "PackedTensor":
        """A copy in the order in which the kernels read it, with the rows in the order of the network."""
        blocks = _zero_blocks(self.type, self.outputs, self.inputs)
        call("gguf_pack", self.data, self.type, self.outputs, self.inputs, self.rope_size, blocks)
        return PackedTensor(blocks, self.type, self.outputs, self.inputs)

    def rows(self, indices: Tensor) -> Tensor:
        """Rows of the file, float32 ``[*, inputs]``, by their indices.

        Raises:
            IndexError: there is no such row.
        """
        _check_rows(indices, self.outputs)
        chosen = self.data.view(self.outputs, -1)[indices.flatten().long()]
        tensor = GgufTensor(chosen, self.type, len(chosen), self.inputs)
        return tensor.packed().dense().view(*indices.shape, self.inputs)


@dataclass(frozen=True)
class PackedTensor:
    """A quantized matrix for the kernels.

    Attributes:
        blocks: int32 ``[blocks, words]``, in the layout of ``kernels/gguf_types.h``.
        type, outputs, inputs: see `GgufTensor`.
    """

    blocks: Tensor
    type: int
    outputs: int
    inputs: int

    def in_four_bits(self) -> "PackedTensor":
        """Its weights rounded to Q4_0, if its type has more than five bits for each."""
        if self.type in _FOUR_BITS:
            return self
        blocks = _zero_blocks(_Q4_0, self.outputs, self.inputs)
        call("gguf_round", self.blocks, self.type, self.outputs, self.inputs, blocks)
        return PackedTensor(blocks, _Q4_0, self.outputs, self.inputs)

    def rows(self, indices: Tensor) -> Tensor:
        """Rows in float32, ``[n, inputs]``, by their indices ``[n]``.

        Raises:
            IndexError: there is no such row.
        """
        _check_rows(indices, self.outputs)
        indices = indices.long().contiguous()
        out = torch.empty(len(indices), self.inputs, dtype=torch.float32, device=indices.device)
        call("gguf_rows", self.blocks, self.type, self.inputs, indices, len(indices), out)
        return out

    def dense(self) -> Tensor:
        """float32 ``[outputs, inputs]``."""
        return self.rows(torch.arange(self.outputs, device=self.blocks.device))


def _zero_blocks(type: int, outputs: int, inputs: int) -> Tensor:
    words = torch.empty(1, dtype=torch.int64)
    call("gguf_block_words", type, inputs, words)
    return zeros(-(-outputs // _ROWS), int(words))


def _check_rows(indices: Tensor, outputs: int) -> None:
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < outputs:
        raise IndexError(f"rows {int(indices.min())} to {int(indices.max())} of a matrix of {outputs}")


class GgufLinear(NativeLinear):
    """A linear layer of one or more matrices of a GGUF file, their outputs one after the other.

    Args:
        tensors: the matrices, with the same inputs.
        bias: ``[out]`` or None.
    """

    def __init__(self, tensors: Sequence[PackedTensor], bias: Tensor | None) -> None:
        structs = [[one.blocks.data_ptr(), one.outputs, one.type] for one in tensors]
        weight = torch.tensor(structs, dtype=torch.int64, device=tensors[0].blocks.device)
        outputs = sum(one.outputs for one in tensors)
        super().__init__(outputs, tensors[0].inputs, WeightFormat.GGUF, weight, bias=bias)
        self.tensors = tuple(tensors)
        for i, one in enumerate(tensors):
            # Whoever counts a model's weights counts these.
            self.register_buffer(f"blocks{i}", one.blocks, persistent=False)

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
        return cls([GgufTensor(blocks, int(kind), outputs, inputs).packed()], linear.bias)

    @property
    def is_in_four_bits(self) -> bool:
        """Whether `in_four_bits` has nothing to round."""
        return all(one.type in _FOUR_BITS for one in self.tensors)

    def in_four_bits(self) -> "GgufLinear":
        """A layer of these weights in four to five bits."""
        return GgufLinear([one.in_four_bits() for one in self.tensors], self.bias)

    def dense(self) -> Tensor:
        """See `PackedLinear.dense`."""
        return torch.cat([one.dense() for one in self.tensors])

    def dense_rows(self, rows: Tensor) -> Tensor:
        """See `PackedLinear.dense_rows`."""
        return self.tensors[0].rows(rows) if len(self.tensors) == 1 else super().dense_rows(rows)


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
        return self.tensor.packed().dense()

    def dense_rows(self, rows: Tensor) -> Tensor:
        """Rows of `dense` by their numbers ``[n]``."""
        return self.tensor.rows(rows)
