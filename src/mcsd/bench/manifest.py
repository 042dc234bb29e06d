"""The manifest: versions, machine and weights that measurements depend on. It names no hosts or people."""

import hashlib
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mcsd.errors import WeightsCorrupt
from mcsd.system import processor

_PACKAGES = ("mcsd", "torch", "transformers", "safetensors", "gguf", "numpy")
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
"""Processor flags that decide how fast matrix products are."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute."""
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads, memory and system; and the accelerator, if the models are on one."""
    model, flags = processor()
    found: dict[str, Any] = {
        "processor": model,
        "instructions": [flag for flag in _INSTRUCTION_SETS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found


def digests(files: Mapping[str, Iterable[Path]]) -> dict[str, dict[str, str]]:
    """The SHA-256 of weight files, by label, then by file name.

    Raises:
        WeightsCorrupt: a file cannot be read.
    """
    return {label: {path.name: _digest(path) for path in paths} for label, paths in files.items()}


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsCorrupt(f"{path} cannot be read: {error}", "fetch the weights again") from error


def without_home(text: str) -> str:
    """A text with ``~`` in place of the user's home folder."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text
