"""The cache of a GGUF file's configuration and tokenizer, with dequantized weights where these are needed.

Reading a tokenizer takes seconds and dequantizing up to a minute; a copy is read at once. The first load writes it to
the folder ``converted`` of the cache folder; later loads read it while the GGUF file stays the same. A copy may be
deleted at any time.
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from mcsd.errors import McsdWarning
from mcsd.system import cache_folder

_SOURCE_FILE = "source.json"
"""In the folder of a copy: what it was made from."""

_FREE_COPIES = 2
"""A copy is written if the disk has space for this many."""


class GgufCache:
    """The copy of a GGUF file, which may or may not exist.

    Args:
        file: the GGUF file.
        dtype: of its dequantized weights; None: a copy without weights.

    Attributes:
        folder: of the copy, as transformers reads it.
    """

    def __init__(self, file: Path, dtype: torch.dtype | None = None) -> None:
        file = file.resolve()
        digest = hashlib.sha256(str(file).encode()).hexdigest()[:12]
        name = "tokenizer" if dtype is None else str(dtype).removeprefix("torch.")
        self.folder = cache_folder("converted") / f"{file.stem}-{digest}-{name}"
        state = file.stat()
        self._source = {
            "file": str(file),
            "bytes": state.st_size,
            "modified": state.st_mtime_ns,
            "transformers": transformers.__version__,
        }

    def is_current(self) -> bool:
        """Whether the copy exists and was made from the file as it is now."""
        try:
            return bool(json.loads((self.folder / _SOURCE_FILE).read_text()) == self._source)
        except (OSError, ValueError):
            return False

    def delete(self) -> None:
        """Delete the copy, if it exists."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write_files(self, save: Callable[[Path], None], size: int = 0) -> None:
        """Write the copy, as `write_whole` does.

        Args:
            save: writes its files into a folder.
            size: of its weights, in bytes.
        """

        def save_all(part: Path) -> None:
            part.mkdir()
            save(part)
            (part / _SOURCE_FILE).write_text(json.dumps(self._source, indent=1) + "\n")
            self.delete()

        write_whole(self.folder, size, save_all, self.is_current)

    def write(self, network: Any, tokenizer: Any | None) -> None:
        """Write a copy with weights.

        Args:
            network: a ``PreTrainedModel``, as it was read from the file.
            tokenizer: its tokenizer, if any.
        """

        def save(part: Path) -> None:
            network.save_pretrained(part)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)

        self.write_files(save, sum(tensor.nbytes for tensor in network.state_dict().values()))


def write_whole(path: Path, size: int, write: Callable[[Path], None], exists: Callable[[], bool]) -> None:
    """Write a cache entry that exists whole or not at all; a warning if the disk is full or not writable.

    Args:
        path: of the entry, a file or a folder that does not exist.
        size: its bytes, roughly.
        write: writes it to another path, from where it is moved.
        exists: whether the entry exists; another process may have written it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < _FREE_COPIES * size:
            raise OSError(f"no space for {size / 1e9:.1f} GB")
        with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as scratch:
            part = Path(scratch) / "copy"
            write(part)
            os.rename(part, path)
    except (OSError, SafetensorError) as error:
        if not exists():
            warnings.warn(f"loading stays slow, {path} cannot be written: {error!s:.200}", McsdWarning, stacklevel=3)
