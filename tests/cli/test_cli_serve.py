"""``mcsd serve``: wrong words are named before anything is loaded. What it serves is tested in tests/server."""

import sys
from pathlib import Path

import pytest

from mcsd.cli import main


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--host", "0.0.0.0"], "without a key"),
        (["--port", "70000"], "port=70000"),
        (["--max-waiting", "-1"], "max_waiting=-1"),
        (["--tls-cert", "x.pem"], "go together"),
        (["--config", "missing.toml"], "not a TOML file"),
        (["--scheme", "nonsense"], "nonsense"),
        (["--max-batch", "0"], "max_batch=0"),
    ],
)
def test_wrong_words(words: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *words]) == 2
    assert error in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("mcsd.server.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve"]) == 1
    assert 'pip install "mcsd[server]"' in capsys.readouterr().err
