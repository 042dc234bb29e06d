"""The machine: versions, and the limits that the timings are compared with."""

import subprocess
import time
from collections.abc import Callable

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import mcsd
from gpu.session import Session

_LAUNCHES = 1000
_NEW_LENGTHS = 12


def measure_machine(session: Session) -> None:
    """Versions, copy bandwidth, and the cost of a launch, of a wait, and of attention at a new length."""
    measured = session.results["machine"] = {
        "card": torch.cuda.get_device_name(session.device) if session.is_cuda else "no card (CPU rehearsal)",
        "driver": _driver() if session.is_cuda else "none",
        "CUDA": torch.version.cuda or "none",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mcsd": mcsd.__version__,
        "copy bandwidth, GB/s": session.bandwidth / 1e9,
    }
    number = torch.zeros(8, device=session.device)

    def launch_many() -> None:
        for _ in range(_LAUNCHES):
            number.add_(1)

    session.synchronize()
    start = time.perf_counter()
    launch_many()
    measured["launch by the host, µs"] = 1e6 * (time.perf_counter() - start) / _LAUNCHES
    measured["launch and smallest kernel, µs"] = 1e6 * session.device_seconds(launch_many, 3) / _LAUNCHES
    measured["read of a number, µs"] = 1e6 * session.wall_seconds(lambda: number[0].item())
    measured["copy of a list to the device, µs"] = 1e6 * session.wall_seconds(
        lambda: torch.tensor([1, 2], device=session.device)
    )
    measured["masked attention at a new length, µs"] = 1e6 * _attention_at_new_lengths(session)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        measured["the same without cuDNN, µs"] = 1e6 * _attention_at_new_lengths(session)
    for name, value in measured.items():
        session.say(f"{name}: {value if isinstance(value, str) else f'{value:.1f}'}")


def _attention_at_new_lengths(session: Session) -> float:
    """Median seconds of masked attention over lengths of which each is seen for the first time.

    Some back ends make a plan for every new length, which takes longer than the attention.
    """
    heads, size, dtype = (32, 128, torch.bfloat16) if session.is_cuda else (4, 16, torch.float32)

    def attention(columns: int) -> Callable[[], object]:
        query = torch.randn(1, heads, 21, size, device=session.device, dtype=dtype)
        keys, values = torch.randn(2, 1, heads, columns, size, device=session.device, dtype=dtype)
        mask = torch.zeros(1, 1, 21, columns, device=session.device, dtype=dtype)
        return lambda: scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    attention(300)()
    seconds = sorted(session.wall_seconds(attention(401 + i), 1) for i in range(_NEW_LENGTHS))
    return seconds[_NEW_LENGTHS // 2]


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
