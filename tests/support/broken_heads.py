"""Faults of the folders of published heads, in both formats of EAGLE-3."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.eagle import Published

Fault = Callable[[Path], Any]
"""Changes the files in the folder of a head."""

FORMATS = (Published("specforge"), Published("speculators"))


def config(**changes: Any) -> Fault:
    """Fields of the configuration."""

    def change(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | changes))

    return change


def layer(**changes: Any) -> Fault:
    """Fields of the configuration of the decoder layers."""

    def change(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        fields.get("transformer_layer_config", fields).update(changes)
        (folder / "config.json").write_text(json.dumps(fields))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Fault:
    """The tensors of the file."""

    def write(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return write


def spoil(name: str, index: int, value: float) -> Fault:
    """One number of a tensor."""

    def change(found: dict[str, torch.Tensor]) -> None:
        found[name].view(-1)[index] = value

    return tensors(change)


def drop(end: str) -> Fault:
    """The tensors whose names have an end."""

    def change(found: dict[str, torch.Tensor]) -> None:
        names = [name for name in found if name.endswith(end)]
        assert names
        for name in names:
            del found[name]

    return tensors(change)


def cast(name: str, dtype: torch.dtype) -> Fault:
    """The type of the numbers of a tensor."""
    return tensors(lambda found: found.update({name: found[name].to(dtype)}))


def written(text: str, file: str = "model.safetensors") -> Fault:
    """The content of a file."""
    return lambda folder: (folder / file).write_text(text)


def truncate(folder: Path) -> None:
    """Keep the first half of the weights."""
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def shards(*files: tuple[str, Callable[[int], bool]]) -> Fault:
    """Several files in place of one, each by its name, with the tensors of some indices."""

    def write(folder: Path) -> None:
        found = list(load_file(folder / "model.safetensors").items())
        (folder / "model.safetensors").unlink()
        for name, has in files:
            part = {key: tensor for index, (key, tensor) in enumerate(found) if has(index)}
            save_file(part, folder / f"{name}.safetensors")

    return write


COMMON: dict[str, tuple[Fault, str]] = {
    "truncated file": (truncate, "cannot be read"),
    "d2t out of range": (spoil("d2t", -1, 21), "outside of a vocabulary"),
    "wrong hidden size": (layer(hidden_size=64), "has the shape"),
    "missing tensor": (drop("mlp.up_proj.weight"), "missing"),
    "NaN weights": (spoil("norm.weight", 3, torch.nan), "NaN"),
    "head of another target": (layer(vocab_size=61), "61 tokens"),
}
"""Faults that downloads and mistakes make, by name, and what the error says."""
