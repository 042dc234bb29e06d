"""What the user sees: text as it comes, a summary, JSON, errors, progress. Results on stdout, all else on stderr."""

import io
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import TyperException

from mcsd.catalog import CATALOG, is_pulled, path_of, pull
from mcsd.errors import McsdError, McsdWarning
from mcsd.params import Chunk, Completion

if TYPE_CHECKING:
    from mcsd.engine import Engine

debugging: ContextVar[bool] = ContextVar("debugging", default=False)
"""Whether the user wants to see tracebacks, and what the libraries say."""

_GREEN, _BOLD, _PLAIN = "\x1b[32m", "\x1b[1m", "\x1b[0m"
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def harmless(text: str) -> str:
    """Spell out control characters, with which a text could move the cursor or reprogram the terminal."""
    return text.translate(_CONTROLS)


def show(chunks: Iterable[Chunk], color: bool) -> Iterator[Chunk]:
    """Write a text to stdout as it comes, and pass its chunks on.

    Args:
        chunks: of one request.
        color: accepted candidates in green, the target's own tokens in bold.
    """
    terminal, started = sys.stdout.isatty(), False
    try:
        for chunk in chunks:
            started = True
            pieces = [harmless(piece) if terminal else piece for piece in chunk.pieces]
            if color:
                pieces = [_painted(piece, i < chunk.accepted) for i, piece in enumerate(pieces)]
            sys.stdout.write("".join(pieces))
            sys.stdout.flush()
            yield chunk
    finally:
        if started:
            print(flush=True)


def _painted(piece: str, drafted: bool) -> str:
    return f"{_GREEN if drafted else _BOLD}{piece}{_PLAIN}" if piece else ""


def legend() -> None:
    """Say on stderr what the colours mean."""
    print(f"{_painted('accepted candidates', True)} · {_painted('from the target', False)}", file=sys.stderr)


def summary(engine: "Engine", done: Completion) -> str:
    """One line: speed, acceptance, scheme and tree."""
    stats = done.stats
    parts = [
        f"{stats.new_tokens} tokens in {sum(stats.seconds.values()):.1f} s ({stats.tokens_per_second:.1f} tokens/s)",
        f"{stats.mean_acceptance_length:.2f} tokens a target call",
    ]
    if stats.draft_tokens:
        parts.append(f"{stats.accepted_tokens} of {stats.draft_tokens} candidates accepted")
    return " · ".join([*parts, f"{engine.scheme_name} {engine.tree}"])


def as_object(engine: "Engine", done: Completion) -> dict[str, Any]:
    """A completion as ``--json`` prints it, with the names that vLLM and OpenAI use."""
    stats = done.stats
    return {
        "text": done.text,
        "token_ids": list(done.token_ids),
        "finish_reason": done.finish_reason,
        "usage": {
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.new_tokens,
            "total_tokens": stats.prompt_tokens + stats.new_tokens,
        },
        "speculative_decoding": {
            "scheme": engine.scheme_name,
            "tree": str(engine.tree),
            "mean_acceptance_length": stats.mean_acceptance_length,
            "draft_acceptance_rate": stats.draft_acceptance_rate,
            "acceptance_histogram": list(stats.acceptance_histogram),
            "target_calls": stats.target_calls,
            "draft_tokens": stats.draft_tokens,
            "accepted_tokens": stats.accepted_tokens,
        },
        "timing": {
            "seconds": sum(stats.seconds.values()),
            "tokens_per_second": stats.tokens_per_second,
            **stats.seconds,
        },
    }


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table, a line a row. Not one of rich: lines stay whole, however narrow the terminal, and can be cut by awk."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def print_json(value: dict[str, Any]) -> None:
    """One object, on one line of ASCII: it reads the same in any terminal and encoding."""
    print(json.dumps(value), flush=True)


def report(error: Exception) -> int:
    """Print an error as one line and a hint on stderr, after its traceback if the user wants that.

    Returns:
        The exit code it calls for.
    """
    if debugging.get():
        traceback.print_exception(error)
    code = 1
    if isinstance(error, McsdError):
        message, hint, code = error.message, error.hint or "see mcsd --help", error.exit_code
    elif isinstance(error, TyperException):
        context = getattr(error, "ctx", None)
        message, code = error.format_message(), error.exit_code
        hint = f"see {context.command_path if context else 'mcsd'} --help"
    else:
        message, hint = f"{type(error).__name__}: {error}", "add --debug to see where it comes from"
    print(f"error: {_line(message)}\nhint: {_line(hint)}", file=sys.stderr)
    return code


def _line(text: str) -> str:
    return harmless(" ".join(text.split()))


def fetch(name: str) -> Path:
    """Do what `mcsd.catalog.pull` does, with a progress bar on stderr if that is a terminal."""
    if is_pulled(name):
        return path_of(name)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"pulling {name}", total=CATALOG[name].size)
        return pull(name, lambda written, size: bar.update(task, completed=written))


def fetch_missing(*names: str | None) -> None:
    """`fetch` what is in the catalogue, of names that may be folders, files, hub ids or None."""
    for name in names:
        if name in CATALOG:
            fetch(str(name))


class Gauge:
    """How long work stands, on stderr: a line that changes, if that is a terminal, and lines that stay."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(file=sys.stderr, highlight=False)
        self._status = self._console.status("starting")

    def show(self, line: str) -> None:
        """Change the line that changes."""
        self._status.update(line)

    def say(self, line: str) -> None:
        """Add a line that stays."""
        self._console.print(line, soft_wrap=True, markup=False)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the work goes on; the libraries' own bars are kept off the terminal."""
        status = self._status if self._console.is_terminal else nullcontext()
        with status, nullcontext() if debugging.get() else redirect_stderr(io.StringIO()):
            yield


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show on stderr, if that is a terminal, that something takes its time, in place of the libraries' own bars."""
    from rich.console import Console

    if debugging.get():
        yield
        return
    console = Console(file=sys.stderr)
    with redirect_stderr(io.StringIO()), console.status(what) if console.is_terminal else nullcontext():
        yield


@contextmanager
def silenced() -> Iterator[None]:
    """Keep the libraries' warnings off the terminal; those of mcsd are a line each."""
    stderr = sys.stderr

    def one_line(message: Warning | str, *_: Any) -> None:
        print(f"warning: {harmless(str(message))}", file=stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", McsdWarning)
        warnings.showwarning = one_line  # type: ignore[assignment]
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
