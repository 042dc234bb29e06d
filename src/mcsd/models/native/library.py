"""The compiled kernels: made by the machine's C++ compiler when they are first needed, and kept for later."""

import ctypes
import hashlib
import os
import subprocess
import warnings
from functools import cache
from pathlib import Path

import torch

from mcsd.catalog import models_folder
from mcsd.errors import McsdWarning, OutputFailed
from mcsd.files import replacing

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"),
    *("-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
)
_ENTRIES = ("product", "before", "behind", "layer")


def available() -> bool:
    """Whether there are kernels for this CPU.

    Not on CPUs with AMX, whose own kernels do many rows for the price of one.
    """
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.cpu._is_vnni_supported()
        and not torch.cpu._is_amx_tile_supported()
        and library() is not None
    )


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, which ``kernels.cpp`` describes; None, with a warning, where no compiler makes them."""
    try:
        kernels = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.CalledProcessError, OutputFailed) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        warnings.warn(f"slower kernels are used, ours cannot be compiled: {reason:.200}", McsdWarning, stacklevel=2)
        return None
    for name in _ENTRIES:
        getattr(kernels, name).restype = None
    return kernels


def _built() -> Path:
    """Where the compiled kernels are; they are compiled if they are not there, which takes some seconds."""
    compiler = os.environ.get("CXX", "c++")
    text = _SOURCE.read_bytes()
    digest = hashlib.sha256(b"\0".join([text, compiler.encode(), " ".join(_FLAGS).encode()])).hexdigest()
    file = models_folder().parent / "compiled" / f"kernels-{digest[:16]}.so"
    if not file.exists():
        with replacing(file) as part:
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(part)]
            subprocess.run(command, check=True, capture_output=True, text=True)
    return file
