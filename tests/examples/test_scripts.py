"""The example scripts run with short arguments on SmolLM2-135M-Instruct, and print what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mcsd.cpu.weight_plan import WeightPlan
from mcsd.loading.catalog import locate
from mcsd.loading.gguf_cache import GgufCache
from mcsd.loading.load import load

FOLDER = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.thorough


def lines(script: str, *arguments: str) -> list[str]:
    """What a script prints."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(FOLDER / script), *arguments]
    run = subprocess.run(words, capture_output=True, text=True, timeout=600, env=env)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.slow
def test_own_model() -> None:
    """A folder of the same model stands for the hub, which tests cannot reach."""
    location = locate("smollm2-135m")
    load("smollm2-135m", torch.device("cpu"), WeightPlan(torch.bfloat16))
    folder = GgufCache(Path(location.source, location.file or ""), torch.bfloat16).folder
    printed = lines("own_model.py", "--model", str(folder), "--tree", "2x1", "--tokens", "16", "--rounds", "1")
    pattern = r"(.+\S) +([\d.]+) tokens/s +([\d.]+) x generate  (same|another) text"
    found = [match for line in printed if (match := re.match(pattern, line))]
    assert [match[1] for match in found] == ["model.generate", "custom_generate", "engine, optimized"]
    rates = [float(match[2]) for match in found]
    assert float(found[0][3]) == 1
    assert float(found[2][3]) == pytest.approx(rates[2] / rates[0], rel=0.05)
    assert found[0][4] == "same"
    assert 1 < float(printed[-2].split(" tokens per forward")[0]) <= 3


def test_openai_client() -> None:
    *rows, _, _ = lines("openai_client.py", "--tokens", "8")
    found = [re.match(r"(\d) at once, (plain|speculative) +(\d+) tokens +([\d.]+) tokens/s$", row) for row in rows]
    assert [(match[1], match[2], int(match[3])) for match in found if match] == [
        ("1", "plain", 8),
        ("1", "speculative", 8),
        ("4", "plain", 32),
        ("4", "speculative", 32),
    ]
    assert all(float(match[4]) > 0 for match in found if match)


@pytest.mark.slow
def test_compare_schemes() -> None:
    _, *rows, _, _ = lines("compare_schemes.py", "--tokens", "16")
    pattern = r"(\S+) +(\d+)  (\S+) +([\d.]+) ± ([\d.]+) +(\d+)%$"
    found = [match for row in rows if (match := re.match(pattern, row))]
    assert len(found) == len(rows) == 10
    lengths = {(match[1], match[3]): float(match[4]) for match in found}
    assert all(1 <= length <= 4 for length in lengths.values())
    assert lengths["2x1", "mcss-wor"] > lengths["2x1", "naive"]  # by far, and the seed is fixed


@pytest.mark.slow
def test_train_draft(tmp_path: Path) -> None:
    arguments = ("--out", str(tmp_path / "head"), "--tokens", "2000", "--steps", "5")
    command, *rows, same, _ = lines("train_draft.py", *arguments)
    assert command == f"mcsd distill --target smollm2-135m --tokens 2000 --steps 5 --batch 16 --out {tmp_path / 'head'}"
    lengths = {row[:14].strip(): float(row[14:]) for row in rows if re.match(r"[\w -]{14} [\d.]+$", row)}
    assert lengths.keys() == {"n-grams", "your head", "default draft"}
    assert 1 <= lengths["n-grams"] < lengths["default draft"]
    assert 1 <= lengths["your head"] < lengths["default draft"]
    assert same.startswith("The texts are the same:")
