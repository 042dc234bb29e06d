"""Telling plain modules from modified ones: only modules that do exactly what their class does are fused or packed."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def is_unmodified(module: nn.Module) -> bool:
    """Whether a module and all in it run the code of their class: no hook, parametrization or replaced forward."""
    return all(
        not (each._forward_hooks or each._forward_pre_hooks or "forward" in vars(each))
        and not parametrize.is_parametrized(each)
        for each in module.modules()
    )


def is_plain_linear(module: Any) -> bool:
    """Whether a module is exactly an ``nn.Linear``: no subclass, adapter, hook, parametrization or quantized weight."""
    if type(module) is not nn.Linear or not is_unmodified(module):
        return False
    weight = module.weight
    return type(weight) in (nn.Parameter, Tensor) and weight.dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
    )
