"""The wheel brings compiled kernels: they run on a machine without a compiler."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from mcsd import kernels

ROOT = Path(__file__).parents[2]

CHECK = """
import torch
from mcsd import kernels
from mcsd.cpu.gguf_linear import GgufLinear
assert kernels.has_kernels()
linear = torch.nn.Linear(64, 48)
found = GgufLinear.quantized(linear)(torch.ones(3, 64))
assert (found - linear(torch.ones(3, 64))).abs().max() < 0.05
print(kernels.__file__)
"""


@pytest.mark.slow
@pytest.mark.skipif(not kernels.has_kernels(), reason="no kernels for this CPU")
def test_kernels_of_the_wheel_run_without_a_compiler(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("mcsd-*.whl")
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    home = tmp_path / "home"
    environment = {**os.environ, "PYTHONPATH": str(site), "CXX": "no-such-compiler", "MCSD_HOME": str(home)}
    command = [sys.executable, "-W", "error::UserWarning", "-c", CHECK]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(site / "mcsd" / "kernels" / "__init__.py")
    assert not list(home.rglob("*.so"))
