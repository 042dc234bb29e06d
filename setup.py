"""Compiles the kernels into wheels, where there is a compiler for x86-64 Linux; all else is in ``pyproject.toml``."""

import os
import platform
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

FOLDER = Path("mcsd", "kernels")
BUILD = runpy.run_path(str(Path(__file__).parent / "src" / FOLDER / "build.py"))
IS_SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"


class BuildWithKernels(build_py):
    """Copies the package and compiles the kernels beside it. Without a compiler they are compiled on first use."""

    def run(self) -> None:  # noqa: D102
        super().run()
        if self.editable_mode or not IS_SUPPORTED:
            return
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        for instructions in BUILD["FLAGS"]:
            out = BUILD["bundled"](instructions, Path(self.build_lib, FOLDER))
            try:
                subprocess.run(BUILD["command"](compiler, instructions, out), check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                self.warn(f"no {out.name}: {error}")


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3, and for this platform if it may have kernels."""

    def finalize_options(self) -> None:  # noqa: D102
        super().finalize_options()
        self.root_is_pure = not IS_SUPPORTED

    def get_tag(self) -> tuple[str, str, str]:  # noqa: D102
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel})
