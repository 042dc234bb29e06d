"""Four bits for the weights of a draft, if it stays nearly what it is: which is found by asking it.

One whose file has weights of four to six bits does. One that was trained from such weights may not: what it has learned
since is as small as the steps that they are rounded to, and is lost again.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mcsd.models import native
from mcsd.models.packing import pack
from mcsd.models.prefill import forward_over
from mcsd.models.transformers import TransformersModel

_TEXT = "The museum had been closed for almost a year when the letter arrived. Nobody knew who had written it, but it"
_TOKENS = 24
"""Of the text, that are read with both weights."""

_ALIKE = 0.7
"""The least that its laws there must have in common, one minus their total variation, on average. Two models as their
files have them had .83 and .85, a pruned one that was trained further .28."""


def pack_coarsely(network: Any, tokenizer: Any | None) -> bool:
    """Pack a draft with weights of four bits, in place.

    Args:
        network: a ``PreTrainedModel``, not packed.
        tokenizer: its own, if there is one.

    Returns:
        Whether it drafts nearly as before. If not it is of no use any more, and has to be read again.
    """
    tokens = _tokens(network, tokenizer)
    before = _laws(network, tokens)
    pack(network, partial(native.NativeLinear, kind=native.Kind.NIBBLES))
    alike = torch.minimum(before, _laws(network, tokens)).sum(-1).mean()
    return bool(alike >= _ALIKE)


def _tokens(network: Any, tokenizer: Any | None) -> list[int]:
    """The beginning of the text; where no tokenizer knows it, tokens from all over the vocabulary."""
    try:
        ids = tokenizer(_TEXT)["input_ids"] if tokenizer is not None else []
    except Exception:
        ids = []  # A tokenizer raises what it likes.
    size = network.config.get_text_config().vocab_size
    return list(ids or range(0, size, max(1, size // _TOKENS)))[:_TOKENS]


def _laws(network: Any, tokens: list[int]) -> Tensor:
    """Distributions ``[n, V]`` after each of n tokens."""
    return forward_over(TransformersModel(network), tokens).logits[0].float().softmax(-1)
