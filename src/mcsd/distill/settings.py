"""The settings file of a run's folder, with the version of its format."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcsd.errors import InvalidOption
from mcsd.files import check_settings

VERSION, VERSION_KEY = 1, "version"


def check_run_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings and the format version, or check that they are those of the existing file.

    Files written before versions were stored are of version 1.

    Raises:
        InvalidOption: other settings, or a version that this mcsd does not know.
        OutputFailed, WeightsCorrupt: the file cannot be written, or cannot be read.
    """
    try:
        old = dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError):
        old = {VERSION_KEY: VERSION}  # No file, or a broken one: `check_settings` handles both.
    version = old.get(VERSION_KEY, VERSION)
    if version != VERSION:
        raise InvalidOption(
            f"{path.parent} has format version {version!r:.40}; this mcsd reads version {VERSION}",
            "use the mcsd that wrote it, or choose another folder",
        )
    check_settings(path, {VERSION_KEY: VERSION, **settings} if VERSION_KEY in old else settings)
