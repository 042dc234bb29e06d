"""The command line: the engine seen through a terminal or a pipe. One file a command; results go to stdout."""

from mcsd.cli.app import app, main

__all__ = ["app", "main"]
