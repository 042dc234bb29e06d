"""Helpers to run the command line."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple


class Result(NamedTuple):
    """Exit code and output of one command line."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


def start(*words: object, **streams: Any) -> subprocess.Popen[str]:
    """Start a command line in its own process, with one thread: spin-waiting threads crawl on a busy machine."""
    command = [sys.executable, "-m", "mcsd", *map(str, words)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # If the tests run in the background, they ignore Ctrl-C, and a child would inherit that.
    return subprocess.Popen(command, text=True, env=environment, preexec_fn=_restore_ctrl_c, **streams)


def _restore_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def assert_one_line_error(result: Result, code: int, *words: str) -> None:
    """Exactly one error line and one hint line, and nothing on stdout."""
    assert (result.code, result.out) == (code, ""), result
    lines = result.err.splitlines()
    assert len(lines) == 2, result.err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    assert len(lines[1]) > len("hint: ")
    for word in words:
        assert word in lines[0]
