"""Running checks of Triton kernels: in triton's interpreter on the CPU, and on a CUDA card if there is one.

Triton reads TRITON_INTERPRET when it is imported, and a process that has imported it cannot change its mind. So the
``check_`` functions of a test file run in a process of their own.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from mcsd.cuda.triton_kernels import is_available

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
"""Of the checks."""


def run_checks(file: str, device: str) -> None:
    """Run the ``check_`` functions of a file on a device: "interpreter" or "cuda"."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if device == "cuda" and not (torch.cuda.is_available() and is_available(torch.device("cuda"))):
        pytest.skip("no CUDA card of compute capability 8.0 or more")
    environment = {**os.environ, "TRITON_INTERPRET": "1" if device == "interpreter" else "0"}
    options = ["-o", "python_functions=check_*", "--noconftest", "-p", "no:cacheprovider", "-q", "-W", "default"]
    command = [sys.executable, "-m", "pytest", *options, file]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def repair_interpreter() -> None:
    """Correct three faults of triton's interpreter (3.6 and before), which the compiler does not have.

    Numpy 2.4 refuses the arrays that it takes as bounds of loops. It truncates to bfloat16. It multiplies the bits of
    bfloat16 as integers.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor
    convert = interpreter._convert_float
    dot = interpreter.InterpreterBuilder.create_dot

    def patch_tensor_for_numpy(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    def convert_with_torch(data: Any, source: Any, target: Any, *mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
        if (source, target) == (tl.bfloat16, tl.float32):
            return torch.from_numpy(data.view("int16").copy()).view(torch.bfloat16).float().numpy()
        return convert(data, source, target, *mode)

    def dot_of_floats(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        if left.dtype == tl.bfloat16:
            left, right = self.cast_impl(left, tl.float32), self.cast_impl(right, tl.float32)
        return dot(self, left, right, *rest)

    interpreter._patch_lang_tensor = patch_tensor_for_numpy
    interpreter._convert_float = convert_with_torch
    interpreter.InterpreterBuilder.create_dot = dot_of_floats


if DEVICE.type == "cpu" and find_spec("triton") is not None:
    repair_interpreter()
