"""How the kernels are compiled: sources and flags by instruction set.

``setup.py`` runs this file by its path to compile the kernels into a wheel, so it imports the standard library only.
"""

from pathlib import Path

_HERE = Path(__file__).parent
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-mfma", "-mf16c")

FLAGS = {
    "avx2": (*_FLAGS, "-mavx2"),
    "avxvnni": (*_FLAGS, "-mavx2", "-mavxvnni"),
    "avx512": (*_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
}
"""The compiler's flags for each instruction set; ``avx512`` includes VNNI."""

_ONLY_AVX512 = {"packed_gemm.cpp", "bf16_linear.cpp"}


def sources(instructions: str) -> list[Path]:
    """The C++ files for an instruction set."""
    files = sorted(_HERE.glob("*.cpp"))
    return [file for file in files if instructions == "avx512" or file.name not in _ONLY_AVX512]


def headers() -> list[Path]:
    """The headers that they include."""
    return sorted(_HERE.glob("*.h"))


def command(compiler: list[str], instructions: str, out: Path) -> list[str]:
    """The command that compiles the library of an instruction set."""
    return [*compiler, *FLAGS[instructions], *map(str, sources(instructions)), "-o", str(out)]


def bundled(instructions: str, folder: Path = _HERE) -> Path:
    """The library that a wheel brings; it does not exist where mcsd runs from source."""
    return folder / f"kernels-{instructions}.so"
