"""Muon against torch's, which computes in bfloat16 only."""

import pytest
import torch
from torch import nn

from mcsd.distill.muon import Muon


def trained(dtype: torch.dtype | None, shape: tuple[int, int]) -> torch.Tensor:
    """A matrix after some steps of our Muon in a dtype, or of torch's."""
    torch.manual_seed(0)
    matrix, unused = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))
    if dtype is None:
        optimizer: torch.optim.Optimizer = torch.optim.Muon(
            [matrix, unused], lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        )
    else:
        optimizer = Muon([matrix, unused], lr=1e-2, weight_decay=0.01, dtype=dtype)
    for _ in range(4):
        matrix.grad = torch.randn(shape)
        optimizer.step()
    return matrix.detach()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_it_steps_as_torch_does_and_in_float32_more_finely(shape: tuple[int, int]) -> None:
    theirs, coarse, fine = trained(None, shape), trained(torch.bfloat16, shape), trained(torch.float32, shape)
    assert torch.equal(coarse, theirs)
    torch.manual_seed(0)
    way = (theirs - torch.randn(shape)).abs().mean()
    assert 0 < (fine - theirs).abs().mean() < 0.05 * way
