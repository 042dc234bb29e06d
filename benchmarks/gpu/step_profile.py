"""What the host and the card do in one step: waits, copies, launches and kernels, counted by torch.profiler."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import mcsd
from gpu.runners import Workload, engine_requests
from gpu.session import Session

_RANGE = "steps"
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
_SKIPPED_STEPS, _STEPS = 3, 4


@dataclass(frozen=True)
class StepCounts:
    """Averages per step.

    Attributes:
        waits: calls in which the host waits for the card.
        copies: copies between host and card.
        launches: calls that launch a kernel or a graph.
        kernels: kernels that ran on the card, those of graphs included.
        busy_ms: milliseconds in which the card ran any of them.
    """

    waits: float
    copies: float
    launches: float
    kernels: float
    busy_ms: float


def count_step(session: Session, engine: mcsd.Engine, work: Workload) -> StepCounts | None:
    """Counts of an average step after the first ones; None where nothing can be counted, as on a CPU."""
    requests = engine_requests(engine, work, seed=1)
    try:
        for _ in range(_SKIPPED_STEPS):
            engine.step()
        session.synchronize()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * session.is_cuda
        steps = 0
        with profile(activities=activities) as recorded:
            with record_function(_RANGE):
                while steps < _STEPS and not all(request.done for request in requests):
                    engine.step()
                    steps += 1
            session.synchronize()
    finally:
        for request in requests:
            engine.cancel(request)
    return count_events(recorded.events() or [], steps)


def count_events(events: Sequence[Any], steps: int) -> StepCounts | None:
    """Counts from the profiler's events; None if there are no kernels among them."""
    on_card = [event for event in events if event.device_type.name == "CUDA" and event.name != _RANGE]
    work = [event for event in on_card if not event.name.startswith(("Memcpy", "Memset"))]
    if not work:
        return None
    # The profiler itself waits before and after the steps.
    steps_range = next(event for event in events if event.name == _RANGE and event.device_type.name == "CPU")
    whole = steps_range.time_range
    names = [event.name for event in events if whole.start <= event.time_range.start <= whole.end]
    copies = [event for event in on_card if event.name.startswith(("Memcpy HtoD", "Memcpy DtoH"))]
    busy, last = 0.0, float("-inf")
    for span in sorted((event.time_range for event in on_card), key=lambda span: float(span.start)):
        busy += max(0.0, span.end - max(span.start, last))
        last = max(last, span.end)
    return StepCounts(
        waits=sum(name in _WAITS for name in names) / steps,
        copies=len(copies) / steps,
        launches=sum(name.startswith(_LAUNCHES) for name in names) / steps,
        kernels=len(work) / steps,
        busy_ms=busy / 1e3 / steps,
    )


def device_memory_gb(session: Session) -> float | None:
    """The most memory that this process has held on the card, in GB; None on a CPU."""
    return torch.cuda.max_memory_allocated(session.device) / 1e9 if session.is_cuda else None
