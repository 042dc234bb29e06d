"""Four bits for the weights of a draft, if it stays nearly what it is: which is found by asking it.

One whose file has weights of four to six bits does. One that was trained from such weights may not: what it has learned
since is as small as the steps that they are rounded to, and is lost again.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mcsd.models import native
from mcsd.models.base import Block
from mcsd.models.packing import pack
from mcsd.models.transformers import TransformersModel

_TEXT = "The museum had been closed for almost a year when the letter arrived. Nobody knew who had written it, but it"
_TOKENS = 24
"""Of a text that is read with both weights; where there is no tokenizer, any tokens."""

_ALIKE = 0.7
"""The least that its laws there must have in common, one minus their total variation, on average. Two models as their
files have them had .83 and .85, a pruned one that was trained further .28."""


@torch.no_grad()
def pack_coarsely(network: Any, tokenizer: Any | None) -> bool:
    """Pack a draft with weights of four bits, in place.

    Args:
        network: a ``PreTrainedModel``, not packed.
        tokenizer: its own, if there is one.

    Returns:
        Whether it drafts nearly as before. If not it is of no use any more, and has to be read again.
    """
    tokens = torch.tensor(_text(tokenizer) or _any(network), dtype=torch.int64)
    before = _laws(network, tokens)
    pack(network, partial(native.NativeLinear, kind=native.Kind.NIBBLES))
    alike = torch.minimum(before, _laws(network, tokens)).sum(-1).mean()
    return bool(alike >= _ALIKE)


def _text(tokenizer: Any | None) -> list[int]:
    """Token ids of the text; none where the tokenizer does not know it, and raises what it likes."""
    try:
        return list(tokenizer(_TEXT)["input_ids"])[:_TOKENS] if tokenizer is not None else []
    except Exception:
        return []


def _any(network: Any) -> list[int]:
    size = network.config.get_text_config().vocab_size
    return list(range(0, size, max(1, size // _TOKENS)))[:_TOKENS]


def _laws(network: Any, tokens: Tensor) -> Tensor:
    """Distributions ``[n, V]`` after each of the tokens ``[n]``."""
    model = TransformersModel(network)
    cache = model.new_cache(1, len(tokens))
    cache.add()
    return model.forward(tokens[None], Block.chain(len(tokens)), cache).logits[0].float().softmax(-1)
