"""The weight plan: the format of a model's linear layers and the kernels that run them, decided once per model.

Device, dtype, role and ``quantize`` go in; the plan is data that loading carries out and `mcsd generate --profile`
prints.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch

from mcsd import kernels
from mcsd.errors import InvalidOption
from mcsd.kernels import WeightFormat


class Role(StrEnum):
    """What a model is loaded for."""

    TARGET = "target"
    DRAFT = "draft"
    HEAD = "head"


@dataclass(frozen=True)
class WeightPlan:
    """How the linear layers of a model are kept and run.

    Attributes:
        dtype: of hidden states, and of weights that have no format.
        format: of quantized and block floating point weights; None: the dtype's.
        packed: whether known layers are fused and linear layers packed into the layout of their kernels.
        native: whether our own kernels run them, instead of oneDNN's.
    """

    dtype: torch.dtype
    format: WeightFormat | None = None
    packed: bool = False
    native: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        weights = f"{dtype}, {self.format.name} weights" if self.format is not None else dtype
        return f"{weights}, {'native kernels' if self.native else 'oneDNN'}" if self.packed else weights


def plan_weights(
    device: torch.device,
    dtype: torch.dtype,
    role: Role,
    quantize: str | None = None,
    in_file: bool = False,
    target: WeightFormat | None = None,
) -> WeightPlan:
    """Decide the weight plan of a model.

    A draft in bfloat16, or of a target with quantized weights, is quantized wherever int8 is fast, because that changes
    q only; a target if asked. Draft models are memory-bound, so in our kernels they get int4 weights; draft heads
    mostly fit into the CPU cache and get int8.

    Args:
        device, dtype, role: of the model.
        quantize: as the user asked.
        in_file: whether it is a GGUF file whose weights the kernels can multiply with as they are.
        target: the format of the target, of a draft.

    Raises:
        InvalidOption: this device cannot run ``quantize``.
    """
    if quantize is not None and device.type != "cpu":
        raise InvalidOption(
            f"quantize {quantize!r} works on a CPU, not on {device}",
            "leave it out and give a model quantized by bitsandbytes, AWQ or GPTQ, as an object or folder",
        )
    if quantize is not None and not has_int8_gemm(device):
        raise InvalidOption(
            f"quantize {quantize!r} needs int8 matrix products (AVX-512 VNNI), which this CPU does not have",
            "leave it out on this machine",
        )
    on_cpu, fast_int8 = device.type == "cpu", has_int8_gemm(device)
    native = on_cpu and kernels.available()
    is_draft = role is not Role.TARGET
    follows = is_draft and target is WeightFormat.GGUF
    keeps = quantize is None and (in_file or (follows and not fast_int8))
    if keeps and on_cpu and dtype in kernels.DTYPES and kernels.has_kernels():
        return WeightPlan(dtype, WeightFormat.GGUF, packed=True, native=True)
    if quantize is not None or (is_draft and fast_int8 and (follows or dtype == torch.bfloat16)):
        if role is Role.TARGET:
            weights = WeightFormat.W8A16
        else:
            weights = WeightFormat.W4A8 if native and role is Role.DRAFT else WeightFormat.W8A8
        return WeightPlan(dtype, weights, packed=True, native=native)
    if not has_bf16_gemm(device, dtype):
        return WeightPlan(dtype)
    if native:
        return WeightPlan(dtype, WeightFormat.BFP16, packed=True, native=True)
    return WeightPlan(dtype, packed=True)


def auto_dtype(device: torch.device) -> torch.dtype:
    """The dtype ``auto``: bfloat16 if the hardware has it; else float16 on CUDA and float32 elsewhere."""
    if device.type == "cuda":
        # Older cards emulate bfloat16, slowly.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if has_bf16_gemm(device) else torch.float32


def has_bf16_gemm(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether ``dtype`` is bfloat16 and this device is a CPU whose oneDNN multiplies it."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def has_int8_gemm(device: torch.device) -> bool:
    """Whether this device is a CPU with fast int8 matrix products (AVX-512 VNNI)."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()  # type: ignore[no-untyped-call]
