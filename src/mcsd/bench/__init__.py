"""Measuring acceptance and speed: systems that answer the same prompts in turn, a log that survives, a report."""

from mcsd.bench.experiment import Experiment, System
from mcsd.bench.grid import grid
from mcsd.bench.paper import paper
from mcsd.bench.results import Results
from mcsd.bench.run import bench
from mcsd.bench.weights import Models, Weights

__all__ = ["Experiment", "Models", "Results", "System", "Weights", "bench", "grid", "paper"]
