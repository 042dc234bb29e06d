"""The wall time of engine steps, by part."""

import time
from collections.abc import Callable
from functools import partial

import torch

PARTS = ("prefill", "draft", "target", "judge", "commit", "other")


class StepClock:
    """Adds up the wall time of the parts of steps.

    CUDA runs behind the host: without waiting, the time of a forward counts for the part that first reads a result. The
    sum of a step is right either way, because a step ends with a read.

    Args:
        device: of the target.
        synchronize: whether to wait for the device at every lap, so that each part has its own time. It slows steps
            down: for calibration and profiles, not for serving. On a CPU it has no effect.
        wait: waits for a CUDA device.

    Attributes:
        synchronize: as given; it may be changed between steps.
        seconds: by part, so far.
    """

    def __init__(
        self,
        device: torch.device,
        synchronize: bool = False,
        wait: Callable[[torch.device], None] = torch.cuda.synchronize,
    ) -> None:
        self.synchronize = synchronize
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._wait = partial(wait, device) if device.type == "cuda" else _no_wait
        self._since = 0.0

    def start(self) -> None:
        """Begin a step: the time since the last lap counts for no part."""
        if self.synchronize:
            self._wait()
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        """Count the time since the last lap, or the start, for a part."""
        if self.synchronize:
            self._wait()
        now = time.perf_counter()
        self.seconds[part] += now - self._since
        self._since = now


def _no_wait() -> None:
    """A CPU does not run behind the host."""
