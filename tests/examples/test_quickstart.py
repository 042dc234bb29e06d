"""examples/quickstart.py runs as it stands, on SmolLM2-135M-Instruct."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "examples" / "quickstart.py"


@pytest.fixture(scope="module")
def sections() -> dict[str, str]:
    """What it prints, by heading."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, FILE], capture_output=True, text=True, check=True, timeout=600, env=env)
    start, *parts = re.split(r"^== (\w+)\n", run.stdout, flags=re.MULTILINE)
    assert start == ""
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_sections(sections: dict[str, str]) -> None:
    assert list(sections) == ["generate", "stats", "stream", "chat", "batch"]
    assert all(len(text) > 20 for text in sections.values())


def test_statistics(sections: dict[str, str]) -> None:
    numbers = [float(number) for number in re.findall(r"[\d.]+", sections["stats"])]
    tokens, forwards, mean_acceptance_length, acceptance_percent, tokens_per_second = numbers
    assert 0 < forwards < tokens <= 48
    assert mean_acceptance_length == pytest.approx(tokens / forwards, abs=0.005)
    assert 0 < acceptance_percent < 100
    assert tokens_per_second > 0


def test_texts(sections: dict[str, str]) -> None:
    assert re.match(r"Speculative decoding makes language models faster because.{10,}", sections["generate"], re.DOTALL)
    assert re.match(r"Once upon a time.{10,}", sections["stream"], re.DOTALL)
    assert "Paris" in sections["chat"]
    assert len(re.findall(r"\((?:length|stop)\)$", sections["batch"], re.MULTILINE)) == 3
