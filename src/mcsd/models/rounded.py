"""The rounded weights of a GGUF model, kept beside its copy: rounding takes longer than mapping them into memory.

What is kept are codes and scales; the layout that kernels want is the library's own and is made at each load.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mcsd.errors import WeightsCorrupt
from mcsd.models.converted import Conversion, keep_whole
from mcsd.models.fusion import fuse
from mcsd.models.packing import int8_layer, pack
from mcsd.models.product import Product
from mcsd.models.quantization import round_weight

_FILE = "int8-1.safetensors"
"""In the folder of a copy: of each linear layer, once it is fused, the codes and the scales. Another way of fusing or
rounding is another number."""

_SCALE = ".scale"
"""Behind the name of a layer: its scales."""


def pack_rounded(network: nn.Module, fine: bool, copy: Conversion) -> None:
    """Do what `pack` does in int8, with the weights that an earlier load has rounded, or for the next one.

    Args:
        network: of the GGUF file.
        fine: see `int8_layer`.
        copy: of the file; where there is none, nothing is kept.

    Raises:
        WeightsCorrupt: what was kept does not belong to this network; it is deleted.
    """
    file = copy.folder / _FILE
    # What is there may be of an earlier file, which could not be replaced.
    there = copy.there()
    known = _read(file) if there else {}
    if known:
        _forget_weights(network)
    fuse(network)
    names = {module: name for name, module in network.named_modules() if type(module) is nn.Linear}
    new: dict[str, Tensor] = {}

    made = int8_layer(fine)

    def layer(linear: nn.Linear) -> Product:
        name = names.pop(linear)
        if known:
            codes, scale = _of(known, name, linear, file)
        else:
            codes, scale = new[name], new[name + _SCALE] = round_weight(linear.weight)
        return made(linear, rounded=(codes, scale))

    pack(network, layer)
    if new and there:
        keep_whole(file, sum(part.nbytes for part in new.values()), lambda part: save_file(new, part), file.exists)


def _read(file: Path) -> dict[str, Tensor]:
    """What is in a file, mapped into memory; nothing if it cannot be read."""
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError):
        return {}


def _forget_weights(network: nn.Module) -> None:
    """Let go of the weights of linear layers, so that fusing does not read them. Their shapes stay."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(module.weight.detach().to("meta"), requires_grad=False)


def _of(known: dict[str, Tensor], name: str, linear: nn.Linear, file: Path) -> tuple[Tensor, Tensor]:
    codes, scale = known.get(name), known.get(name + _SCALE)
    kinds = (torch.int8, linear.weight.shape), (torch.float32, linear.weight.shape[:1])
    if codes is None or scale is None or ((codes.dtype, codes.shape), (scale.dtype, scale.shape)) != kinds:
        file.unlink(missing_ok=True)
        raise WeightsCorrupt(f"{file} does not hold {name} of this model", "it has been deleted: load the model again")
    return codes, scale
