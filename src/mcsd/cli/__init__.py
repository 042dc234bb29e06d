"""The command line, one file per command. Results go to stdout, everything else to stderr."""

from mcsd.cli.app import app, main, run

__all__ = ["app", "main", "run"]
