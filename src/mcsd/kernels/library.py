"""The compiled kernels: made by the machine's C++ compiler when they are first needed, and kept for later."""

import ctypes
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from mcsd.catalog import models_folder
from mcsd.errors import McsdWarning, OutputFailed
from mcsd.files import replacing

_HERE = Path(__file__).parent
_SOURCES = [_HERE / name for name in ("layers.cpp", "distributions.cpp")]
_HEADER = _HERE / "numbers.h"
_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"),
    *("-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
)
_ENTRIES = ("shorts", "product", "before", "behind", "stack", "head", "softmax", "largest")

DTYPES = (torch.float32, torch.bfloat16)
"""What the kernels read and write."""


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


class _NotCompiledError(Exception):
    """Why there are no kernels."""


def library() -> ctypes.CDLL | None:
    """The kernels, which their sources describe; None, with a warning, where no compiler makes them."""
    with _lock:
        return _loaded()


def call(entry: str, *arguments: Any) -> None:
    """Call a kernel.

    Args:
        entry: its name.
        arguments: as its definition has them but for the threads: structs, tensors that are `readable` or None,
            numbers, and a dtype where it asks whether numbers are halves.
    """
    given = [_given(each) for each in arguments]
    getattr(library(), entry)(*given, ctypes.c_int(torch.get_num_threads()))


def _given(argument: Any) -> Any:
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    if isinstance(argument, torch.dtype):
        return ctypes.c_bool(argument == torch.bfloat16)
    if isinstance(argument, bool):
        return ctypes.c_bool(argument)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


def readable(part: Tensor, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """A tensor as a kernel reads it, contiguous.

    Raises:
        ValueError: it has not ``width`` numbers of this dtype for each token, or the kernels do not read that dtype.
    """
    if part.numel() != tokens * width or part.dtype != dtype or dtype not in DTYPES:
        found = f"{tuple(part.shape)} of {part.dtype}"
        raise ValueError(f"for {tokens} tokens there must be {width} numbers of {dtype} each, not {found}")
    return part.contiguous()


_lock = Lock()


@cache
def _loaded() -> ctypes.CDLL | None:
    try:
        kernels = _load()
    except (_NotCompiledError, OSError, OutputFailed) as error:
        warnings.warn(f"slower kernels are used, ours cannot be compiled: {error!s:.200}", McsdWarning, stacklevel=4)
        return None
    for name in _ENTRIES:
        getattr(kernels, name).restype = None
    return kernels


def _load() -> ctypes.CDLL:
    """The compiled kernels; they are compiled if they are not there, which takes some seconds."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    made_of = [*compiler, *_FLAGS, platform.machine(), *platform.libc_ver()]
    made_of += [source.read_text() for source in (*_SOURCES, _HEADER)]
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()
    file = models_folder().parent / "compiled" / f"kernels-{digest[:16]}.so"
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not all(map(_is_ours, filter(Path.exists, (file.parent, file)))):
        # What others could have written is not run.
        with tempfile.TemporaryDirectory() as folder:
            return ctypes.CDLL(str(_compiled(compiler, Path(folder) / file.name)))
    try:
        return ctypes.CDLL(str(file))
    except OSError:
        return ctypes.CDLL(str(_compiled(compiler, file)))


def _is_ours(path: Path) -> bool:
    """Whether nobody but the user and the system can have written there."""
    state = path.stat()
    return state.st_uid in (0, os.getuid()) and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _compiled(compiler: list[str], file: Path) -> Path:
    with replacing(file) as part:
        command = [*compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(part)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise _NotCompiledError(f"{compiler[0]}: {error.strerror}") from error
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise _NotCompiledError(f"{compiler[0]}: {said[0]}")
    return file
