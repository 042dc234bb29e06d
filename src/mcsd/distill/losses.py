"""Training losses, all on the full distribution of the target rather than on its tokens.

``kl`` (forward, Hinton et al. 2015) makes the draft cover all that the target may generate; ``reverse-kl`` makes it
avoid all that the target does not; ``tv``, the total variation, is one minus the acceptance rate of a single candidate
(Leviathan et al. 2023; DistillSpec, Zhou et al. 2023, arXiv 2310.08461, compares them).
"""

from collections.abc import Callable, Mapping

from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""A function of the log-probabilities ``[N, K]`` of target and draft; the mean over N."""


def forward_kl(target: Tensor, draft: Tensor) -> Tensor:
    """KL(p, q)."""
    return (target.exp() * (target - draft)).sum(-1).mean()


def reverse_kl(target: Tensor, draft: Tensor) -> Tensor:
    """KL(q, p)."""
    return (draft.exp() * (draft - target)).sum(-1).mean()


def total_variation(target: Tensor, draft: Tensor) -> Tensor:
    """Half the sum of absolute differences."""
    return 0.5 * (target.exp() - draft.exp()).abs().sum(-1).mean()


LOSS_FUNCTIONS: Mapping[str, Loss] = {"kl": forward_kl, "reverse-kl": reverse_kl, "tv": total_variation}
