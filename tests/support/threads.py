"""Run functions in threads, with a limit: a deadlock fails a test instead of stopping the suite."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mcsd.models import ModelOutput
from mcsd.testing import TabularModel

LIMIT = 30.0
"""Seconds. No test needs a second of them."""


class Thread:
    """A function in a thread of its own, begun at once."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Any:
        """What the function returned, or its exception as an object."""
        self._thread.join(LIMIT)
        assert not self.is_running, "deadlock"
        return self._result if self._error is None else self._error


def together(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of functions that begin at the same time, each in a thread; exceptions as objects."""
    barrier = threading.Barrier(len(functions), timeout=LIMIT)

    def begin(function: Callable[[], Any]) -> Any:
        barrier.wait()
        return function()

    threads = [Thread(lambda function=function: begin(function)) for function in functions]  # type: ignore[misc]
    return [thread.result() for thread in threads]


class Watched(TabularModel):
    """A table with something to do before every forward; it counts the sequences of each."""

    def __init__(self, seed: int = 0, size: int = 12) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.rand(size, size, generator=generator) ** 3 + 0.01
        super().__init__(rows / rows.sum(-1, keepdim=True))
        self.before: Callable[[], object] = lambda: None
        self.batches: list[int] = []

    def forward(self, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> ModelOutput:
        self.before()
        self.batches.append(len(tokens))
        return super().forward(tokens, *args, **kwargs)


class Gate:
    """Lets a number of passages through; whoever comes when none is left waits for more."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self.reached = threading.Event()
        """Set once somebody has come."""

    def __call__(self) -> None:
        self.reached.set()
        assert self._permits.acquire(timeout=LIMIT), "nobody opened the gate"

    def open(self, passages: int = 1) -> None:
        self._permits.release(passages)


def wait_for(condition: Callable[[], bool], seconds: float = LIMIT) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "deadlock"
        time.sleep(0.001)
