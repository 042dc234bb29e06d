"""The cache of int8 weights of a GGUF model, beside its dequantized copy: quantizing takes longer than reading them.

The cache holds quantized values and scales; packing them for the kernels is done at each load.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mcsd.cpu.packed_linear import PackedLinear
from mcsd.cpu.packing import pack, pack_linear, packable_linears
from mcsd.cpu.quantization import quantize_int8
from mcsd.cpu.weight_plan import WeightPlan
from mcsd.errors import WeightsCorrupt
from mcsd.loading.gguf_cache import GgufCache, write_whole

_FILE = "int8-2.safetensors"
"""In the folder of the GGUF cache: values and scales of each linear layer, by its name after fusing. The number changes
with fusing or rounding."""

_SCALE = ".scale"


def pack_from_int8_cache(network: nn.Module, plan: WeightPlan, cache: GgufCache) -> None:
    """`pack` with int8 weights that an earlier load quantized, or quantized now for the next load.

    Args:
        network: of the GGUF file.
        plan: a plan with int8 weights.
        cache: of the file; if it does not exist, nothing is written.

    Raises:
        WeightsCorrupt: the cached weights do not belong to this network; they are deleted.
    """
    file = cache.folder / _FILE
    # An outdated cache that could not be replaced is not used.
    is_current = cache.is_current()
    known = _read(file) if is_current else {}
    if known:
        _drop_weights(network)
    new: dict[str, Tensor] = {}

    def make(name: str, linear: nn.Linear) -> PackedLinear:
        if known:
            values, scale = _find(known, name, linear, file)
        else:
            values, scale = new[name], new[name + _SCALE] = quantize_int8(linear.weight)
        return pack_linear(linear, plan, (values, scale))

    pack(network, plan, make)
    if new and is_current:
        for outdated in cache.folder.glob("int8-*.safetensors"):
            outdated.unlink()
        write_whole(file, sum(part.nbytes for part in new.values()), lambda part: save_file(new, part), file.exists)


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory; none if it cannot be read."""
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (it is not a dict)
    except (OSError, SafetensorError):
        return {}


def _drop_weights(network: nn.Module) -> None:
    """Move the weights of linear layers to the meta device, so that fusing does not read them. Their shapes stay."""
    for _, _, _, linear in packable_linears(network):
        linear.weight = nn.Parameter(linear.weight.detach().to("meta"), requires_grad=False)


def _find(known: dict[str, Tensor], name: str, linear: nn.Linear, file: Path) -> tuple[Tensor, Tensor]:
    values, scale = known.get(name), known.get(name + _SCALE)
    expected = (torch.int8, linear.weight.shape), (torch.float32, linear.weight.shape[:1])
    if values is None or scale is None or ((values.dtype, values.shape), (scale.dtype, scale.shape)) != expected:
        file.unlink(missing_ok=True)
        raise WeightsCorrupt(f"{file} does not hold {name} of this model", "it has been deleted: load the model again")
    return values, scale
