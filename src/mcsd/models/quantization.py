"""Linear layers in int8: half the bytes of bfloat16, and products that are cheap where a CPU multiplies bytes.

A weight has one scale for each output, a state one for each token, so that what a token gives depends on no other: with
a scale for a whole batch the law at a node would change with its siblings. Sums are exact integers, however many rows
there are.

A state can be two bytes, as two rows of the same product: the weights, which are what takes the time of a few rows, are
read once. Of what int8 does to a law most is due to states of one byte, so a target has two; a draft, whose q may be
anything, has one. Where our own kernels run, the weights of a draft that is a model are half bytes if it bears that
(`coarse`).
"""

import torch
from torch import Tensor, nn

from mcsd.errors import InvalidOption
from mcsd.models.product import Product

QUANTIZATIONS = ("int8",)
"""What ``quantize`` may say, beside None."""

_MOST = 127
"""The largest code; a state's codes are moved by `_ZERO` to be unsigned, as the kernels want them."""

_ZERO = 128

_FINER = 254
"""Steps of the second byte to one of the first, which leaves half a step to either side."""

_LEAST = 1e-30
"""The least that the largest of a row counts for: of zeros, and of what is too small for its steps to be numbers."""

_BLOCK = 128
"""Rows of a weight that are rounded at a time."""

GROUP = 32
"""Inputs of a weight in half bytes that have a step of their own."""

_MOST_NIBBLE = 15

_LEAST_STEP, _MOST_STEP = 2.0**-24, 65504.0
"""The smallest and the largest number of float16: for groups of zeros, or too small for a step, and for weights that no
model has."""


class Int8Linear(Product):
    """A linear layer whose weight is rounded to int8, and whose states are as they come in.

    Args:
        linear: the layer, in any dtype; its weight may be freed afterwards.
        fine: whether states are two bytes.
        rounded: what `round_weight` makes of its weight, which is not read then.
    """

    def __init__(self, linear: nn.Linear, fine: bool, rounded: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__(len(linear.weight))
        self.fine = fine
        codes, self.scale = round_weight(linear.weight) if rounded is None else rounded
        self.weight = torch.ops.onednn.qlinear_prepack(codes, None)
        self._zeros = torch.zeros(len(codes), dtype=torch.int64)
        self._half, self._finer_half = torch.tensor([_ZERO + 0.5, _ZERO + 0.5 - _FINER / 2])
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, states: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, in the states' dtype."""
        largest = states.abs().amax(-1, keepdim=True).float().clamp_(min=_LEAST)
        # Rounded by cutting off, half a step further up; no code is below zero then.
        steps = torch.addcmul(self._half, states.float(), _MOST / largest)
        if self.fine:
            codes = steps.floor()
            finer = torch.add(self._finer_half, steps.sub_(codes), alpha=_FINER)
            out = self.product(torch.stack([codes, finer]).to(torch.uint8))
            out = out[0].add_(out[1], alpha=1 / _FINER)
        else:
            out = self.product(steps.to(torch.uint8))
        largest.mul_(1 / _MOST)
        out = out.mul_(largest) if self.bias is None else torch.addcmul(self.bias, out, largest)
        return out.to(states.dtype)

    def multiply(self, states: Tensor) -> Tensor:
        """See `Product.multiply`, here of codes moved by `_ZERO`."""
        if not states.numel():
            # The kernel gives another shape where there are no rows.
            return states.new_zeros(*states.shape[:-1], self.outputs, dtype=torch.float32)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(states, 1.0, _ZERO, self.weight, self.scale, self._zeros),
            *(None, 1.0, 0, torch.float32, "none", [], ""),
        )
        return out

    def dense(self) -> Tensor:
        """See `Product.dense`."""
        codes: Tensor = self.weight.to_dense()
        return codes.t().float() * self.scale[:, None]


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, int8 ``[out, in]``, and the scale of each output, float32 ``[out]``."""
    weight = weight.detach()
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight))
    # A few rows at a time, which stay in the processor's cache: loading is twice as fast.
    for start in range(0, len(weight), _BLOCK):
        rows = slice(start, start + _BLOCK)
        scale = scales[rows].copy_(weight[rows].abs().amax(-1)).clamp_(min=_LEAST).div_(_MOST)
        codes[rows] = weight[rows].div(scale[:, None]).round_()
    return codes, scales


def round_in_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Four bits a number: ``weight ≈ least + step * code`` in groups of `GROUP` inputs.

    A group's least number is at most zero and its largest at least that, so that zeros stay zeros nearly.

    Args:
        weight: ``[out, in]``, whole groups.

    Returns:
        Codes, uint8 ``[out, in]`` from 0 to 15; step and least, float16 ``[out, in / GROUP]``.
    """
    groups = weight.float().view(len(weight), -1, GROUP)
    least = groups.amin(-1).clamp_(min=-_MOST_STEP, max=0).half()
    step = groups.amax(-1).clamp_(min=0).sub_(least).div_(_MOST_NIBBLE).clamp_(min=_LEAST_STEP, max=_MOST_STEP).half()
    codes = groups.sub(least[..., None]).div_(step[..., None]).round_().clamp_(0, _MOST_NIBBLE)
    return codes.to(torch.uint8).view(weight.shape), step, least


def quantizable(device: torch.device) -> bool:
    """Whether this machine multiplies bytes."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()  # type: ignore[no-untyped-call]


def check_quantize(quantize: str | None, device: torch.device) -> None:
    """Whether what a user asks for can be done here.

    Raises:
        InvalidOption: it cannot.
    """
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise InvalidOption(
            f"quantize {quantize!r:.40} is unknown", f"one of {', '.join(QUANTIZATIONS)}, or leave it out"
        )
    if quantize is not None and not quantizable(device):
        raise InvalidOption(
            f"quantize {quantize!r} needs a CPU that multiplies bytes (AVX-512 VNNI)", "leave it out on this machine"
        )
