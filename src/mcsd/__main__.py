"""``python -m mcsd``: the same as ``mcsd``."""

from mcsd.cli import run

run()
