"""The dtype and quantization that multiply fastest on this machine, by measurement."""

import time
from typing import TypeVar

import torch
from torch import nn

from mcsd.cpu.packing import pack_linear
from mcsd.cpu.weight_plan import Role, WeightPlan, auto_dtype, has_bf16_gemm, has_int8_gemm, plan_weights

_Choice = TypeVar("_Choice")

_CLEARLY_FASTER = 0.8
"""A choice that rounds more must take at most this share of the time, so that the choice is the same on every run."""

_SIZE, _ROWS, _REPEATS = 1024, 128, 20


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The dtype, bfloat16 or float32, in which matrix products of many rows are fastest.

    CPUs that have bfloat16 differ: some multiply it at twice the rate of float32, some need twice the time. Training in
    float16 would need scaled losses.
    """
    if device.type == "cuda" and auto_dtype(device) == torch.bfloat16:
        return torch.bfloat16
    if not has_bf16_gemm(device):
        return torch.float32
    return _fastest({dtype: _product_seconds(WeightPlan(dtype)) for dtype in (torch.float32, torch.bfloat16)})


def fastest_precision(device: torch.device) -> tuple[torch.dtype, str | None]:
    """The dtype and ``quantize`` with which a target reads many sequences fastest."""
    if device.type != "cpu":
        return auto_dtype(device), None
    choices: list[tuple[torch.dtype, str | None]] = [(torch.float32, None)]
    if has_bf16_gemm(device):
        choices.append((torch.bfloat16, None))
    if has_int8_gemm(device):
        choices.append((torch.float32, "int8"))
    return _fastest(
        {choice: _product_seconds(plan_weights(device, choice[0], Role.TARGET, choice[1])) for choice in choices}
    )


def _fastest(seconds: dict[_Choice, float]) -> _Choice:
    """The fastest choice; one that rounds more than those before it must be `_CLEARLY_FASTER`."""
    chosen, *others = seconds
    for choice in others:
        if seconds[choice] < _CLEARLY_FASTER * seconds[chosen]:
            chosen = choice
    return chosen


def _product_seconds(plan: WeightPlan) -> float:
    linear: nn.Module = nn.Linear(_SIZE, _SIZE, bias=False, dtype=plan.dtype).requires_grad_(False)
    if plan.packed:
        assert isinstance(linear, nn.Linear)
        linear = pack_linear(linear, plan)
    activations = torch.ones(_ROWS, _SIZE, dtype=plan.dtype)
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        linear(activations)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
