"""The README's Python example runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_the_python_example(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    assert len(capsys.readouterr().out) > 100
    assert len(names["many"]) == 2  # type: ignore[arg-type]
    assert names["done"].stats.new_tokens > 0  # type: ignore[attr-defined]
