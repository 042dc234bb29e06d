"""Linear layers of a user's model, faster for few tokens, without a change to the model."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mcsd import kernels


class UnpackedLinears(TorchFunctionMode):
    """In its context ``torch.nn.functional.linear`` runs in our kernel where this computes the same.

    For few tokens PyTorch reads bfloat16 weights that are not packed more slowly than the kernel does.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """One call of PyTorch's Python interface."""
        if func is nn.functional.linear and not kwargs and kernels.bf16_linear_supported(*args):
            return kernels.bf16_linear(*args)
        return func(*args, **(kwargs or {}))


def unpacked_linears(network: nn.Module, device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """The context in which to run a network: `UnpackedLinears` if it has layers that gain by it, else nothing."""
    gains = device.type == "cpu" and dtype == torch.bfloat16 and kernels.available()
    return UnpackedLinears() if gains and any(type(each) is nn.Linear for each in network.modules()) else nullcontext()
