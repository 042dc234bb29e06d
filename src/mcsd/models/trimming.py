"""Drafts that propose only some tokens: their output matrix holds those rows alone (FR-Spec, arXiv 2502.14856).

A small model with a large vocabulary spends much of its time on the output matrix. Cutting it changes q only. A folder
of such a draft holds the whole model, and beside it the tokens that it may propose when it drafts.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mcsd.errors import WeightsCorrupt
from mcsd.models.packing import dense_weight

VOCABULARY = "vocabulary.safetensors"
"""File in the folder of a draft: int32 ``vocabulary [K]``, ascending."""


def check_ids(ids: Tensor, size: int) -> None:
    """Raise `ValueError` unless these are ascending token ids of a vocabulary of ``size``, one at least."""
    if ids.dim() != 1 or not len(ids) or ids[0] < 0 or ids[-1] >= size or (ids.diff() <= 0).any():
        raise ValueError("its vocabulary is not one of ascending token ids of the target")


def load_vocabulary(folder: Path, size: int) -> Tensor | None:
    """The tokens that the draft in a folder may propose, int64 ``[K]``; None: all.

    Raises:
        WeightsCorrupt: the file cannot be read, or names tokens that a vocabulary of ``size`` does not have.
    """
    path = folder / VOCABULARY
    if not path.exists():
        return None
    try:
        ids: Tensor = load_file(path)["vocabulary"].long()
        check_ids(ids, size)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise WeightsCorrupt(
            f"{path} cannot be read: {error!s:.200}", "delete it to draft with all tokens, or make the draft again"
        ) from error
    return ids


def trim(network: Any, vocabulary: Tensor) -> None:
    """Cut the output matrix of a model of transformers to some tokens, in place. Its embeddings stay."""
    network.set_output_embeddings(rows_of(network.get_output_embeddings(), vocabulary))


def rows_of(linear: Any, chosen: Tensor) -> nn.Linear:
    """A linear layer of ``chosen [K]`` rows of another, packed or not, in its dtype; not copied if it is all."""
    weight, bias = dense_weight(linear), linear.bias
    layer = nn.Linear(1, 1, bias=bias is not None)
    every = len(chosen) == len(weight)
    layer.weight = nn.Parameter(weight if every else weight[chosen.long()], requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach() if every else bias.detach()[chosen.long()], requires_grad=False)
    return layer
