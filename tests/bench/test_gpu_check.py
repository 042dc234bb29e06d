"""The check for CUDA cards, rehearsed at tiny size on a CPU: it measures, names what is wrong, and goes on."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu import __main__ as check
from gpu.correctness import outcome_of
from gpu.distribution import p_value, random_table
from gpu.step_profile import StepCounts, count_events
from gpu.tables import MISSING, render
from mcsd.errors import UnsupportedModel
from mcsd.schemes.recursive import McssWithoutReplacement

DOCS = Path(__file__).parents[2] / "docs"


def run(folder: Path, *sections: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the results of a short run."""
    options = ["--device", "cpu", "--tiny", "--new", "8", "--seconds", "120", "--out", str(folder)]
    code = check.main([*options, "--only", *sections])
    return code, json.loads((folder / "gpu.json").read_text())


@pytest.mark.thorough
def test_the_rehearsal_measures(tmp_path: Path) -> None:
    code, results = run(tmp_path, "machine", "parity", "tree", "pair", "batch", "timing")
    assert code == 0
    assert not results["failed"]
    assert all(results["checks"].values())
    assert results["parity"]["llama"] == {"equal": 32, "ties": 0, "different": 0}
    assert results["machine"]["copy bandwidth, GB/s"] > 0
    assert 0.6 < results["pair"]["acceptance"] < 0.85
    records = {(one["system"], one["temperature"]): one for one in results["timing"]}
    assert {"generate", "generate, assisted", "mcsd none", "mcsd chain:4", "mcsd 4x2x2x2"} <= {s for s, _ in records}
    for one in results["timing"]:
        assert one["tokens/s"] > 0
        assert one["ms per step"] > 0
        assert 0 < one["share of roofline"] < 1
    assert records["generate", 1.0]["acceptance length"] == records["mcsd none", 1.0]["acceptance length"] == 1
    assert records["mcsd 4x2x1", 0.0]["acceptance length"] > 1.3
    assert records["mcsd 4x2x1", 0.0]["parts, ms"]["target"] > 0
    assert records["mcsd 4x2x1", 0.0]["counts"] == "not measured"
    tables = (tmp_path / "gpu.md").read_text()
    assert "## Measured on no card (CPU rehearsal)" in tables
    assert "| mcsd 4x2x2x2 |" in tables


def test_a_fault_of_verification_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, results = run(tmp_path, "distribution")
    assert (code, results["checks"]) == (0, {"distribution: mcss-wor": True})
    # Candidates are drawn without replacement and verified as independent draws.
    monkeypatch.setattr(McssWithoutReplacement, "without_replacement", False)
    code, results = run(tmp_path, "distribution")
    assert (code, results["checks"], results["failed"]) == (1, {"distribution: mcss-wor": False}, {})


def test_a_section_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(session: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setitem(check.SECTIONS, "tree", check.Section(fail, 0))
    code, results = run(tmp_path, "tree", "pair")
    assert code == 1
    assert results["failed"] == {"tree": "RuntimeError: out of order"}
    assert results["pair"]["entropy"] > 1
    assert "[tree] FAILED: RuntimeError: out of order" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_the_rehearsal_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        check.main([])
    assert stopped.value.code == 2
    assert "--device cpu --tiny" in capsys.readouterr().err


def event(name: str, start: float, end: float, device: str = "CPU") -> Any:
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=span, device_type=SimpleNamespace(name=device))


def test_waits_launches_and_kernels_are_counted() -> None:
    events = [
        event("cudaDeviceSynchronize", 0, 1),  # The profiler's own.
        event("steps", 10, 90),
        event("steps", 12, 95, "CUDA"),
        event("cudaLaunchKernel", 20, 21),
        event("cudaGraphLaunch", 22, 23),
        event("cudaMemcpyAsync", 24, 25),
        event("cudaStreamSynchronize", 25, 60),
        event("gemm", 30, 40, "CUDA"),
        event("softmax", 35, 50, "CUDA"),
        event("Memcpy DtoH (Device -> Pageable)", 50, 52, "CUDA"),
        event("Memset (Device)", 60, 61, "CUDA"),
        event("cudaDeviceSynchronize", 91, 99),
    ]
    assert count_events(events, steps=2) == StepCounts(waits=0.5, copies=0.5, launches=1, kernels=1, busy_ms=0.0115)
    assert count_events(events[:2], steps=2) is None


def test_p_values() -> None:
    table = random_table(seed=1)
    counts = 1000 * table
    assert p_value(counts, table) == pytest.approx(1.0)
    assert p_value(counts.roll(1, dims=1), table) == 0.0
    uniform = torch.full((2, 2), 0.5, dtype=torch.float64)
    # One row at two standard deviations, one row without counts.
    assert p_value(torch.tensor([[60.0, 40.0], [0.0, 0.0]], dtype=torch.float64), uniform) == pytest.approx(
        0.0455, abs=1e-4
    )


def test_a_refusal_is_a_named_error() -> None:
    def refuse() -> None:
        raise UnsupportedModel("draft on cpu, target on cuda:0", "move it")

    assert outcome_of(refuse) == (True, "UnsupportedModel: draft on cpu, target on cuda:0 (move it)")
    assert outcome_of(lambda: torch.ones(2) @ torch.ones(3))[0] is False
    assert outcome_of(lambda: None) == (True, "works")


def test_the_documentation_holds_the_tables_of_the_stored_run() -> None:
    stored = DOCS / "gpu.json"
    tables = render(json.loads(stored.read_text()) if stored.exists() else {})
    assert stored.exists() or MISSING in tables
    assert tables in (DOCS / "gpu.md").read_text()
