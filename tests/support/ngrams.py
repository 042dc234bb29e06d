"""A look-up that proposes on any evidence, so that short texts have candidates."""

import torch

from mcsd.drafters import NgramDrafter


def eager_ngram() -> NgramDrafter:
    """Proposes all that it finds, because for it larger steps are faster."""
    drafter = NgramDrafter(torch.device("cpu"))
    drafter.cost = lambda batch_size, nodes: 1 / (1 + nodes)
    return drafter
