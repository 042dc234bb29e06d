"""Draft vocabularies: an output matrix cut to the tokens that a draft proposes (FR-Spec, arXiv 2502.14856).

A small model with a large vocabulary spends much of its time on the output matrix. Cutting it changes q only, so the
output distribution stays the target's. A folder of such a draft holds the whole model and, in a file of its own, the
tokens that it proposes.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mcsd.errors import WeightsCorrupt

VOCABULARY_FILE = "vocabulary.safetensors"
"""In the folder of a draft: int32 ``vocabulary [K]``, ascending."""


def check_vocabulary(ids: Tensor, size: int) -> None:
    """Raise `ValueError` unless ``ids`` are ascending token ids of a vocabulary of ``size``, at least one."""
    if ids.dim() != 1 or not len(ids) or ids[0] < 0 or ids[-1] >= size or (ids.diff() <= 0).any():
        raise ValueError("the draft vocabulary does not hold ascending token ids of the target")


def load_vocabulary(folder: Path, size: int) -> Tensor | None:
    """The draft vocabulary in a folder, int64 ``[K]``; None: the draft proposes all tokens.

    Raises:
        WeightsCorrupt: the file cannot be read, or holds tokens outside a vocabulary of ``size``.
    """
    path = folder / VOCABULARY_FILE
    if not path.exists():
        return None
    try:
        ids: Tensor = load_file(path)["vocabulary"].long()
        check_vocabulary(ids, size)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise WeightsCorrupt(
            f"{path} cannot be read: {error!s:.200}", "delete it to draft with all tokens, or make the draft again"
        ) from error
    return ids


def cut_vocabulary(network: Any, vocabulary: Tensor) -> None:
    """Cut the output matrix of a ``PreTrainedModel`` to some tokens, in place. Its embeddings stay."""
    network.set_output_embeddings(output_rows(network.get_output_embeddings(), vocabulary))


def output_rows(linear: Any, chosen: Tensor) -> nn.Linear:
    """A linear layer of the rows ``chosen [K]`` of another one, packed or not; all rows are not copied."""
    size = linear.out_features if hasattr(linear, "dense") else len(linear.weight)
    all_rows, bias = len(chosen) == size, linear.bias
    weight = dense_weight(linear, None if all_rows else chosen.long())
    layer = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach() if all_rows else bias.detach()[chosen.long()], requires_grad=False)
    return layer


def dense_weight(module: Any, rows: Tensor | None = None) -> Tensor:
    """The weight ``[out, in]`` of a linear layer or an embedding, packed or not; some rows of it, or all."""
    if hasattr(module, "dense"):
        weight: Tensor = module.dense() if rows is None else module.dense_rows(rows)
        return weight
    weight = module.weight.detach()
    return weight if rows is None else weight[rows]


def input_size(module: Any) -> int:
    """The size of the hidden states that a linear layer reads, or that an embedding gives."""
    return dense_weight(module, torch.zeros(1, dtype=torch.long)).shape[1]
