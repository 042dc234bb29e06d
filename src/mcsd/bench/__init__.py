"""Benchmarks of acceptance and speed: interleaved systems, a resumable log, confidence intervals, a report."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mcsd.bench.experiment import Experiment, System
from mcsd.bench.grid import grid
from mcsd.bench.paper import paper

if TYPE_CHECKING:
    from mcsd.bench.bench_models import BenchModelOptions, BenchModels
    from mcsd.bench.benchmark import bench
    from mcsd.bench.results import Results

__all__ = ["BenchModelOptions", "BenchModels", "Experiment", "Results", "System", "bench", "grid", "paper"]

_LAZY = {
    "BenchModelOptions": "mcsd.bench.bench_models",
    "BenchModels": "mcsd.bench.bench_models",
    "Results": "mcsd.bench.results",
    "bench": "mcsd.bench.benchmark",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
