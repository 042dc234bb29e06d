"""The fastest precision is chosen by measurement, and the same one whenever measurements are close."""

import pytest
import torch

from mcsd.cpu.fastest import fastest_precision
from mcsd.cpu.weight_plan import has_bf16_gemm, has_int8_gemm

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not (has_bf16_gemm(CPU) and has_int8_gemm(CPU)), reason="this CPU has one precision only"
)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [((2.6, 1.34, 1.36), 1), ((2.6, 1.36, 1.34), 1), ((2.6, 1.4, 1.0), 2), ((1.0, 0.9, 0.95), 0), ((1.0, 2.0, 0.5), 2)],
)
def test_of_precisions_that_take_as_long_it_is_always_the_same(
    seconds: tuple[float, ...], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So text that is generated in it is repeatable."""
    times = iter(seconds)
    monkeypatch.setattr("mcsd.cpu.fastest._product_seconds", lambda plan: next(times))
    precisions = [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "int8")]
    assert fastest_precision(CPU) == precisions[expected]
