"""Benchmarks of acceptance and speed: interleaved systems, a resumable log, confidence intervals, a report."""

from typing import TYPE_CHECKING

from mcsd.bench.experiment import Experiment, System
from mcsd.bench.grid import grid
from mcsd.bench.paper import paper
from mcsd.lazy import lazy_attributes

if TYPE_CHECKING:
    from mcsd.bench.bench_models import BenchModelOptions, BenchModels
    from mcsd.bench.benchmark import bench
    from mcsd.bench.results import Results

__all__ = ["BenchModelOptions", "BenchModels", "Experiment", "Results", "System", "bench", "grid", "paper"]

__getattr__ = lazy_attributes(
    __name__,
    {
        "BenchModelOptions": "mcsd.bench.bench_models",
        "BenchModels": "mcsd.bench.bench_models",
        "Results": "mcsd.bench.results",
        "bench": "mcsd.bench.benchmark",
    },
)
