"""Two tables as target and draft: a whole experiment in a second."""

from typing import Any

import torch

from mcsd.testing import TabularModel

VOCABULARY = 12
PROMPTS: dict[str, list[Any]] = {"one": [[1, 2], [3], [4]], "other": [[5, 6], [7], [8]]}


def tables() -> tuple[TabularModel, TabularModel]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.rand(2, VOCABULARY, VOCABULARY, generator=generator) ** 3 + 0.01
    target, draft = rows / rows.sum(-1, keepdim=True)
    return TabularModel(target), TabularModel(draft)
