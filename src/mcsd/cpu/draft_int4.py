"""Int4 weights for draft models, if their predictions barely change.

Drafts whose files have weights of four to six bits pass. A draft that was fine-tuned from such weights may fail: what
it has learned is as small as the rounding of its weights, and is lost again.
"""

from typing import Any

import torch
from torch import Tensor

from mcsd.cpu.gguf_linear import GgufLinear
from mcsd.cpu.native_decoder import as_decoder
from mcsd.cpu.packing import pack
from mcsd.cpu.weight_plan import WeightPlan
from mcsd.models.prefill import score_text
from mcsd.models.protocol import LanguageModel
from mcsd.models.transformers import TransformersModel

_TEXT = "The museum had been closed for almost a year when the letter arrived. Nobody knew who had written it, but it"
_TOKENS = 24
"""Tokens of the text whose predictions are compared."""

_MIN_OVERLAP = 0.7
"""Least mean overlap (one minus total variation) of the predictions. Two models as their files have them measured .83
and .85; a pruned model that had been trained further .28."""


def pack_int4(network: Any, tokenizer: Any | None, plan: WeightPlan) -> bool:
    """Pack a draft with int4 weights, in place.

    Args:
        network: a ``PreTrainedModel``, not packed.
        tokenizer: its tokenizer, if any.
        plan: a plan with int4 weights.

    Returns:
        Whether its predictions barely change. If not, the network is useless and must be loaded again.
    """
    tokens = _tokens(network, tokenizer)
    before = _distributions(TransformersModel(network), tokens)
    pack(network, plan)
    packed = as_decoder(network, "", None, str(plan), lambda: network)
    return _overlap(before, _distributions(packed, tokens)) >= _MIN_OVERLAP


def round_to_int4(network: Any, tokenizer: Any | None, plan: WeightPlan) -> bool:
    """Round the weights of a draft in the format `WeightFormat.GGUF` to four bits, in place.

    Args:
        network: with `GgufLinear` layers.
        tokenizer, plan: see `pack_int4`.

    Returns:
        Whether its predictions barely change. If not, the network stays as it is.
    """
    found = {name: module for name, module in network.named_modules() if isinstance(module, GgufLinear)}
    layers = {name: layer for name, layer in found.items() if not layer.is_in_four_bits}
    if not layers:
        return True
    tokens = _tokens(network, tokenizer)
    before = _distributions(as_decoder(network, "", None, str(plan), lambda: network), tokens)
    for name, layer in layers.items():
        network.set_submodule(name, layer.in_four_bits())
    rounded = as_decoder(network, "", None, str(plan), lambda: network)
    if _overlap(before, _distributions(rounded, tokens)) >= _MIN_OVERLAP:
        return True
    for name, layer in layers.items():
        network.set_submodule(name, layer)
    return False


def _overlap(before: Tensor, after: Tensor) -> float:
    return float(torch.minimum(before, after).sum(-1).mean())


def _tokens(network: Any, tokenizer: Any | None) -> list[int]:
    """The start of the text; without a tokenizer that knows it, tokens spread over the vocabulary."""
    try:
        ids = tokenizer(_TEXT)["input_ids"] if tokenizer is not None else []
    except Exception:
        ids = []  # A tokenizer may raise anything.
    size = network.config.get_text_config().vocab_size
    return list(ids or range(0, size, max(1, size // _TOKENS)))[:_TOKENS]


def _distributions(model: LanguageModel, tokens: list[int]) -> Tensor:
    """Next-token distributions ``[n, V]`` after each of n tokens."""
    return score_text(model, tokens).logits[0].float().softmax(-1)
