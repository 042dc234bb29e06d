"""What mcsd keeps on disk below its cache folder, by model. Imports no torch."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mcsd.errors import OutputFailed
from mcsd.loading.catalog import CATALOG, path_of
from mcsd.system import cache_folder

WEIGHTS, COPY, PROFILE, KERNELS = "weights", "converted copy", "profile", "kernels"


@dataclass(frozen=True)
class CachedFile:
    """A file or folder of the cache.

    Attributes:
        model: the catalog name, or the path of the GGUF file; empty for what belongs to no model.
        kind: `WEIGHTS` (downloaded), or what is made again when it is missing: `COPY` of a GGUF file's tokenizer, or of
            the dequantized file;
            `PROFILE` of the speed of a pair; compiled `KERNELS`.
        path: of the file or folder.
        size: in bytes.
    """

    model: str
    kind: str
    path: Path
    size: int


def cached_files() -> list[CachedFile]:
    """What mcsd has written to its cache folder, leftovers of interrupted downloads included."""
    names = {str(path_of(name).resolve()): name for name in CATALOG}
    found = [_entry(name, WEIGHTS, path_of(name)) for name in CATALOG if path_of(name).is_file()]
    found += [_entry("", WEIGHTS, path) for path in _matching("models", ".pull-*")]
    found += [_entry(names.get(source, source), COPY, folder) for source, folder in _copies()]
    found += [_entry("", PROFILE, path) for path in _matching("profiles", "*-????????????.json")]
    found += [_entry("", KERNELS, path) for path in _matching("compiled", "kernels-*.so")]
    return sorted(found, key=lambda one: (not one.model, one.model, one.kind, one.path.name))


def has_copy(name: str) -> bool:
    """Whether a model of the catalog has been loaded before, which leaves a copy."""
    weights = str(path_of(name).resolve())
    return any(source == weights for source, _ in _copies())


def delete(files: Iterable[CachedFile]) -> int:
    """Delete files of the cache and return their bytes. Running engines keep what they have mapped.

    Raises:
        OutputFailed: the folder is not writable.
    """
    freed = 0
    for file in files:
        try:
            if file.path.is_dir() and not file.path.is_symlink():
                shutil.rmtree(file.path)
            else:
                file.path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputFailed(
                f"{file.path} cannot be deleted: {error.strerror or error}", "check its owner"
            ) from error
        freed += file.size
    return freed


def _copies() -> Iterator[tuple[str, Path]]:
    """The GGUF file and the folder of each converted copy."""
    for path in _matching("converted", "*/source.json"):
        # It may be of another version, or deleted meanwhile.
        with suppress(OSError, ValueError, LookupError, TypeError):
            yield str(json.loads(path.read_text())["file"]), path.parent


def _matching(folder: str, pattern: str) -> list[Path]:
    """Files of mcsd in a folder of the cache, which may hold others."""
    return sorted(cache_folder(folder).glob(pattern))


def _entry(model: str, kind: str, path: Path) -> CachedFile:
    size = 0
    for file in [path, *path.rglob("*")]:
        with suppress(OSError):  # Another process may have deleted it.
            size += file.stat().st_size if file.is_file() else 0
    return CachedFile(model, kind, path, size)
