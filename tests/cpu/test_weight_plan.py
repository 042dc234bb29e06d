"""The weight plan: one decision by device, dtype, role and quantize."""

import pytest
import torch

from mcsd import errors
from mcsd.cpu.weight_plan import Role, WeightPlan, has_int8_gemm, plan_weights

CPU = torch.device("cpu")

needs_int8 = pytest.mark.skipif(not has_int8_gemm(CPU), reason="this CPU has no fast int8 products")


def formats(native: bool, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[torch.dtype, Role, str | None], str]:
    """The plan of every combination, on a CPU with every instruction, with our kernels or without."""
    monkeypatch.setattr("mcsd.cpu.weight_plan.kernels.available", lambda: native)
    monkeypatch.setattr("mcsd.cpu.weight_plan.has_int8_gemm", lambda device: True)
    monkeypatch.setattr("mcsd.cpu.weight_plan.has_bf16_gemm", lambda device, dtype: dtype == torch.bfloat16)
    dtypes, quantized = (torch.float32, torch.bfloat16), (None, "int8")
    return {(d, r, q): str(plan_weights(CPU, d, r, q)) for d in dtypes for r in Role for q in quantized}


def test_with_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    found = formats(True, monkeypatch)
    f32, bf16 = torch.float32, torch.bfloat16
    assert {found[f32, role, None] for role in Role} == {"float32"}
    assert found[bf16, Role.TARGET, None] == "bfloat16, BFP16 weights, native kernels"
    assert found[bf16, Role.TARGET, "int8"] == "bfloat16, W8A16 weights, native kernels"
    assert found[f32, Role.TARGET, "int8"] == "float32, W8A16 weights, native kernels"
    for quantize in (None, "int8"):
        assert found[bf16, Role.DRAFT, quantize] == "bfloat16, W4A8 weights, native kernels"
        assert found[bf16, Role.HEAD, quantize] == "bfloat16, W8A8 weights, native kernels"
    assert found[f32, Role.DRAFT, "int8"] == "float32, W4A8 weights, native kernels"
    assert found[f32, Role.HEAD, "int8"] == "float32, W8A8 weights, native kernels"


def test_with_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    found = formats(False, monkeypatch)
    f32, bf16 = torch.float32, torch.bfloat16
    assert {found[f32, role, None] for role in Role} == {"float32"}
    assert found[bf16, Role.TARGET, None] == "bfloat16, oneDNN"
    assert found[bf16, Role.TARGET, "int8"] == "bfloat16, W8A16 weights, oneDNN"
    assert {found[bf16, role, None] for role in (Role.DRAFT, Role.HEAD)} == {"bfloat16, W8A8 weights, oneDNN"}
    assert {found[f32, role, "int8"] for role in (Role.DRAFT, Role.HEAD)} == {"float32, W8A8 weights, oneDNN"}


def test_other_devices_keep_their_weights() -> None:
    meta = torch.device("meta")
    for role in Role:
        assert plan_weights(meta, torch.bfloat16, role) == WeightPlan(torch.bfloat16)
    for device in (meta, torch.device("cuda", 0)):
        with pytest.raises(errors.InvalidOption, match=f"'int8' works on a CPU, not on {device}") as info:
            plan_weights(device, torch.bfloat16, Role.TARGET, "int8")
        assert "bitsandbytes, AWQ or GPTQ" in info.value.hint


def test_a_cpu_without_int8_products_refuses_quantize(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcsd.cpu.weight_plan.has_int8_gemm", lambda device: False)
    assert plan_weights(CPU, torch.float32, Role.DRAFT) == WeightPlan(torch.float32)
    with pytest.raises(errors.InvalidOption, match="AVX-512 VNNI"):
        plan_weights(CPU, torch.float32, Role.TARGET, "int8")
