"""Random distributions of many kinds."""

import torch
from torch import Tensor


def distributions(count: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """``[count, V]``: ordinary ones, peaked, with zeros, one-hot, with ties, uniform on some tokens."""

    def random(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    kinds = torch.stack(
        [
            random(count, vocabulary) + 1e-3,
            random(count, vocabulary) ** 6 + 1e-9,
            random(count, vocabulary) * (random(count, vocabulary) < 0.5),
            torch.nn.functional.one_hot(torch.randint(vocabulary, (count,), generator=generator), vocabulary).double(),
            torch.randint(1, 3, (count, vocabulary), generator=generator).double(),
            (random(count, vocabulary) < 0.6).double(),
        ],
        dim=1,
    )
    chosen = kinds[torch.arange(count), torch.randint(kinds.shape[1], (count,), generator=generator)]
    chosen[chosen.sum(-1) == 0, 0] = 1.0
    return chosen / chosen.sum(-1, keepdim=True)
