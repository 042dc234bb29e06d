"""Copies of GGUF models in safetensors: dequantizing takes up to a minute, mapping a copy into memory takes none.

The first load in a dtype leaves a copy in ``$MCSD_HOME/converted``, which later loads read while the GGUF file stays as
it was. A copy may be deleted at any time.
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

from mcsd.catalog import models_folder
from mcsd.errors import McsdWarning

_SOURCE = "source.json"
"""In the folder of a copy: what it was made of."""

_ROOM = 2
"""A copy is made where there is room for so many."""


class Conversion:
    """The copy of a GGUF file in a dtype, which may or may not be there.

    Args:
        file: the GGUF file.
        dtype: of the weights.
    """

    def __init__(self, file: Path, dtype: torch.dtype) -> None:
        file = file.resolve()
        place = hashlib.sha256(str(file).encode()).hexdigest()[:12]
        name = str(dtype).removeprefix("torch.")
        self.folder = models_folder().parent / "converted" / f"{file.stem}-{place}-{name}"
        """Where the copy is: a folder that transformers reads."""
        state = file.stat()
        self._source = {
            "file": str(file),
            "bytes": state.st_size,
            "modified": state.st_mtime_ns,
            "transformers": transformers.__version__,
        }

    def there(self) -> bool:
        """Whether there is a copy of the file as it is now."""
        try:
            return bool(json.loads((self.folder / _SOURCE).read_text()) == self._source)
        except (OSError, ValueError):
            return False

    def drop(self) -> None:
        """Delete the copy, if there is one."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def keep(self, network: Any, tokenizer: Any | None) -> None:
        """Make the copy, as `keep_whole` does.

        Args:
            network: a ``PreTrainedModel``, as it was read.
            tokenizer: its own, if it has one.
        """

        def write(part: Path) -> None:
            network.save_pretrained(part)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
            (part / _SOURCE).write_text(json.dumps(self._source, indent=1) + "\n")
            self.drop()

        size = sum(tensor.nbytes for tensor in network.state_dict().values())
        keep_whole(self.folder, size, write, self.there)


def keep_whole(place: Path, size: int, write: Callable[[Path], None], there: Callable[[], bool]) -> None:
    """Make a copy that is there whole or not at all.

    Where there is no room for it, or it cannot be written, that is a warning and no more.

    Args:
        place: a file, or a folder that is not there.
        size: its bytes, about.
        write: makes it somewhere else, from where it is moved.
        there: whether it is in its place; another process may be faster.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(place.parent).free < _ROOM * size:
            raise OSError(f"no room for {size / 1e9:.1f} GB")
        with tempfile.TemporaryDirectory(prefix=".part-", dir=place.parent) as scratch:
            part = Path(scratch) / "copy"
            write(part)
            os.rename(part, place)
    except (OSError, SafetensorError) as error:
        if not there():
            warnings.warn(f"loading stays slow, {place} cannot be written: {error!s:.200}", McsdWarning, stacklevel=3)
