"""An experiment on tables."""

import pytest

from mcsd.bench import BenchModels, Experiment, grid
from support.tables import tables


@pytest.fixture
def models() -> BenchModels:
    target, draft = tables()
    return BenchModels(target, None, {"draft": draft})


@pytest.fixture
def experiment() -> Experiment:
    systems = grid(["2x1", "auto"], ["mcss-wor"], ["single", "naive"])
    return Experiment(tuple(systems), max_new_tokens=6)
