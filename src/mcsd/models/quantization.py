"""Linear layers in int8: half the bytes of bfloat16, and products that are cheap where a CPU multiplies bytes.

A weight has one scale for each output, a state one for each token, so that what a token gives depends on no other: with
a scale for a whole batch the law at a node would change with its siblings. Sums are exact integers, however many rows
there are.

A state can be two bytes, as two rows of the same product: the weights, which are what takes the time of a few rows, are
read once. Of what int8 does to a law most is due to states of one byte, so a target has two; a draft, whose q may be
anything, has one.
"""

import torch
from torch import Tensor, nn

from mcsd.errors import InvalidOption

QUANTIZATIONS = ("int8",)
"""What ``quantize`` may say, beside None."""

_MOST = 127
"""The largest code; a state's codes are moved by `_ZERO` to be unsigned, as the kernels want them."""

_ZERO = 128

_FINER = 254
"""Steps of the second byte to one of the first, which leaves half a step to either side."""


class Int8Linear(nn.Module):
    """A linear layer whose weight is rounded to int8, and whose states are as they come in.

    Args:
        linear: the layer, in any dtype; its weight may be freed afterwards.
        fine: whether states are two bytes.
    """

    def __init__(self, linear: nn.Linear, fine: bool) -> None:
        super().__init__()
        self.fine = fine
        weight = linear.weight.detach().float()
        self.scale = _scales(weight)
        codes = (weight / self.scale).round_().to(torch.int8)
        self.scale = self.scale[:, 0]
        self.weight = torch.ops.onednn.qlinear_prepack(codes, None)
        self._zeros = torch.zeros(len(codes), dtype=torch.int64)
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, states: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, in the states' dtype."""
        states_scale = _scales(states.float())
        steps = states / states_scale
        codes = steps.round()
        out = self._product(torch.stack([codes, (steps - codes).mul_(_FINER).round_()]) if self.fine else codes[None])
        out = out[0].add_(out[1], alpha=1 / _FINER) if self.fine else out[0]
        out.mul_(states_scale)
        if self.bias is not None:
            out.add_(self.bias)
        return out.to(states.dtype)

    def _product(self, codes: Tensor) -> Tensor:
        if not codes.numel():
            # The kernel gives another shape where there are no rows.
            return codes.new_zeros(*codes.shape[:-1], len(self.scale), dtype=torch.float32)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            *((codes + _ZERO).to(torch.uint8), 1.0, _ZERO, self.weight, self.scale, self._zeros),
            *(None, 1.0, 0, torch.float32, "none", [], ""),
        )
        return out

    def dense(self) -> Tensor:
        """The rounded weight, float32 ``[out, in]``."""
        codes: Tensor = self.weight.to_dense()
        return codes.t().float() * self.scale[:, None]


def _scales(rows: Tensor) -> Tensor:
    """``[..., 1]``: the size of one step of the codes of each row. A row that holds a NaN gets one."""
    return rows.abs().amax(-1, keepdim=True).div_(_MOST).clamp_(min=torch.finfo(torch.float32).tiny)


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
