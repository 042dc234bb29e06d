"""``compile=True``: what stands between the large products of a decoder layer, as few kernels of its own.

`torch.compile` makes two functions of a layer, before and behind its attention, that serve all layers and every number
of tokens. Attention and products stay calls of a library. Kernels are kept on disk, so the second start is quick.
"""

import os
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from mcsd.catalog import models_folder
from mcsd.errors import McsdWarning
from mcsd.models.fusion import Attention, FeedForward, fuse
from mcsd.models.halves import halve
from mcsd.models.prefill import forward_over
from mcsd.models.transformers import TransformersModel

_PLACE = "TORCHINDUCTOR_CACHE_DIR"
"""The environment's word for where kernels are kept; what a user sets there counts."""


def compile_layers(model: TransformersModel) -> None:
    """Compile the layers of a model in place, and run them once so that no request has to wait for it.

    What cannot be compiled runs as it is, and a warning says so: there is no compiler, or the layers are of no known
    kind.
    """
    fuse(model.network)
    layers = [layer for layer in model.network.modules() if isinstance(getattr(layer, "self_attn", None), Attention)]
    if layers and all("forward" in vars(layer) for layer in layers):
        return  # They run in kernels that are compiled already: see `mcsd.models.native`.
    if not layers or not all(isinstance(layer.mlp, FeedForward) for layer in layers):
        warnings.warn(
            f"compile: the layers of {model.name} are of no known kind, they run as they are", McsdWarning, stacklevel=2
        )
        return
    # torch writes its default there itself, a folder that a restart of the machine empties.
    if os.environ.get(_PLACE, default_cache_dir()) == default_cache_dir():
        os.environ[_PLACE] = str(models_folder().parent / "compiled")
    # Each model has its own: what one was compiled for does not count for another.
    own: Any = partial(torch.compile, dynamic=True, isolate_recompiles=True)
    before, behind = own(_before), own(_behind)
    for layer in layers:
        attention, block = layer.self_attn, layer.mlp
        halve(
            layer,
            partial(before, layer.input_layernorm, attention),
            partial(behind, attention.out, layer.post_attention_layernorm, block),
        )
    try:
        for tokens in (1, 2):  # One token is a shape of its own.
            forward_over(model, [0] * tokens)
    except TorchDynamoException as error:
        for layer in layers:
            del layer.forward
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"compile: {model.name} runs uncompiled: {reason:.200}", McsdWarning, stacklevel=2)


def _before(
    norm: nn.Module, attention: Attention, states: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return attention.heads(norm(states), cos, sin)


def _behind(out: nn.Module, norm: nn.Module, block: FeedForward, states: Tensor, seen: Tensor) -> Tensor:
    states = states + out(seen)
    behind: Tensor = states + block(norm(states))
    return behind
