"""Two tables as target and draft: a whole experiment in a second."""

from typing import Any

import pytest
import torch

from mcsd.bench import Experiment, Models, grid
from mcsd.testing import TabularModel

VOCABULARY = 12
PROMPTS: dict[str, list[Any]] = {"one": [[1, 2], [3], [4]], "other": [[5, 6], [7], [8]]}


def tables() -> tuple[TabularModel, TabularModel]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.rand(2, VOCABULARY, VOCABULARY, generator=generator) ** 3 + 0.01
    target, draft = rows / rows.sum(-1, keepdim=True)
    return TabularModel(target), TabularModel(draft)


@pytest.fixture
def models() -> Models:
    target, draft = tables()
    return Models(target, None, {"draft": draft})


@pytest.fixture
def experiment() -> Experiment:
    systems = grid(["2x1", "auto"], ["mcss-wor"], ["single", "naive"])
    return Experiment(tuple(systems), max_new_tokens=6)
