"""The shared library of the kernels, called by ctypes: a wheel brings it; from source it is compiled on first use."""

import ctypes
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import tempfile
import warnings
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from mcsd.errors import McsdWarning, OutputFailed
from mcsd.files import atomic_path
from mcsd.kernels import build
from mcsd.system import cache_folder

_ENTRIES = (
    *("linear", "pre_attention", "post_attention", "decoder", "draft_head", "softmax", "top_k"),
    *("gguf_block_words", "gguf_pack", "gguf_rows", "gguf_round", "pack_bfp16", "bf16_linear"),
)

DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes that the kernels read and write."""


def has_kernels() -> bool:
    """Whether the kernels for GGUF files and logits run on this CPU. They need AVX2. The first call compiles them."""
    return _instructions() is not None and library() is not None


def available() -> bool:
    """Whether all kernels run on this CPU, those for packed weights too, which need AVX-512 VNNI.

    Packed weights are not used on CPUs with AMX, on which PyTorch's kernels multiply many rows in the time of one.
    """
    return _instructions() == "avx512" and not torch.cpu._is_amx_tile_supported() and library() is not None


def _instructions() -> str | None:
    """The instruction set of `build.FLAGS` that the kernels use on this CPU; None if it has none of them."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and torch.cpu._is_vnni_supported():
        return "avx512"
    if capability not in ("AVX2", "AVX512"):
        return None
    # Older versions of torch do not tell.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "avxvnni" if capabilities.get("avx_vnni") else "avx2"


class _NotCompiledError(Exception):
    """The compiler failed."""


def library() -> ctypes.CDLL | None:
    """The shared library; None, with a warning, if it cannot be compiled."""
    with _lock:
        return _loaded()


def call(entry: str, *arguments: Any) -> None:
    """Call a kernel.

    Args:
        entry: its name.
        arguments: those of its C++ definition, without the threads: structs, tensors (see `readable`) or None for
            pointers, a dtype for ``bf16``, numbers.
    """
    converted = [_converted(argument) for argument in arguments]
    getattr(library(), entry)(*converted, ctypes.c_int(torch.get_num_threads()))


def _converted(argument: Any) -> Any:
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    if isinstance(argument, torch.dtype):
        return ctypes.c_bool(argument == torch.bfloat16)
    if isinstance(argument, bool):
        return ctypes.c_bool(argument)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


def readable(tensor: Tensor, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """The tensor, contiguous, as a kernel reads it.

    Raises:
        ValueError: it does not hold ``width`` numbers of this dtype for each token, or the dtype is not in `DTYPES`.
    """
    if tensor.numel() != tokens * width or tensor.dtype != dtype or dtype not in DTYPES:
        given = f"{tuple(tensor.shape)} in {tensor.dtype}"
        raise ValueError(f"a tensor is {given}: {tokens} tokens need {width} numbers of {dtype} each")
    return tensor.contiguous()


_lock = Lock()


@cache
def _loaded() -> ctypes.CDLL | None:
    try:
        kernels = _load()
    except (_NotCompiledError, OSError, OutputFailed) as error:
        warnings.warn(
            f"PyTorch's slower kernels are used, as ours cannot be compiled: {error!s:.200}", McsdWarning, stacklevel=4
        )
        return None
    for name in filter(partial(hasattr, kernels), _ENTRIES):
        getattr(kernels, name).restype = None
    return kernels


def _load() -> ctypes.CDLL:
    """The library of the wheel, or the cached one for these sources; it is compiled first, in some seconds."""
    instructions = _instructions()
    assert instructions is not None
    bundled = build.bundled(instructions)
    if bundled.exists():
        return ctypes.CDLL(str(bundled))
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    key = [*compiler, *build.FLAGS[instructions], platform.machine(), *platform.libc_ver()]
    key += [file.read_text() for file in (*build.sources(instructions), *build.headers())]
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()
    file = cache_folder("compiled") / f"kernels-{digest[:16]}.so"
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not all(map(_is_trusted, filter(Path.exists, (file.parent, file)))):
        with tempfile.TemporaryDirectory() as folder:
            return ctypes.CDLL(str(_compiled(compiler, instructions, Path(folder) / file.name)))
    try:
        return ctypes.CDLL(str(file))
    except OSError:
        return ctypes.CDLL(str(_compiled(compiler, instructions, file)))


def _is_trusted(path: Path) -> bool:
    """Whether only the user and root can have written to it."""
    state = path.stat()
    return state.st_uid in (0, os.getuid()) and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _compiled(compiler: list[str], instructions: str, file: Path) -> Path:
    with atomic_path(file) as part:
        command = build.command(compiler, instructions, part)
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise _NotCompiledError(f"{compiler[0]}: {error.strerror}") from error
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise _NotCompiledError(f"{compiler[0]}: {lines[0]}")
    return file
