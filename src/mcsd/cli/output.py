"""Output: streamed text, summaries, JSON, errors, progress. Results go to stdout, everything else to stderr."""

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

from mcsd.errors import McsdError, McsdWarning
from mcsd.loading.catalog import CATALOG, is_pulled, locate, path_of, pull
from mcsd.params import Chunk, Completion

if TYPE_CHECKING:
    from mcsd.engine import Engine

debug_enabled: ContextVar[bool] = ContextVar("debug_enabled", default=False)
"""Whether tracebacks and messages of libraries are shown."""

_GREEN, _BOLD, _PLAIN = "\x1b[32m", "\x1b[1m", "\x1b[0m"
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def escape_control_characters(text: str) -> str:
    """Escape control characters, which could move the cursor or reprogram the terminal."""
    return text.translate(_CONTROLS)


def write_stream(chunks: Iterable[Chunk], color: bool) -> Iterator[Chunk]:
    """Write the chunks of one request to stdout and yield them.

    Args:
        chunks: of one request.
        color: whether to print accepted candidates in green and the target's own tokens in bold.
    """
    terminal, started = sys.stdout.isatty(), False
    try:
        for chunk in chunks:
            started = True
            pieces = [escape_control_characters(piece) if terminal else piece for piece in chunk.pieces]
            if color:
                pieces = [_colored(piece, i < chunk.accepted) for i, piece in enumerate(pieces)]
            sys.stdout.write("".join(pieces))
            sys.stdout.flush()
            yield chunk
    finally:
        if started:
            print(flush=True)


def _colored(piece: str, drafted: bool) -> str:
    return f"{_GREEN if drafted else _BOLD}{piece}{_PLAIN}" if piece else ""


def print_color_legend() -> None:
    """Print the meaning of the colors to stderr."""
    print(f"{_colored('accepted candidates', True)} · {_colored('from the target', False)}", file=sys.stderr)


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


def completion_json(engine: "Engine", done: Completion) -> dict[str, Any]:
    """A completion as ``--json`` prints it, with the names used by vLLM and OpenAI."""
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
    """A table with one line per row. Unlike rich's, its lines never wrap, so that awk can split them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def print_json(value: dict[str, Any]) -> None:
    """Print an object on one line of ASCII, safe in any terminal and encoding."""
    print(json.dumps(value), flush=True)


def print_error(error: Exception) -> int:
    """Print an error to stderr as one line and a hint, after its traceback with ``--debug``.

    Returns:
        The exit code.
    """
    if debug_enabled.get():
        traceback.print_exception(error)
    code = 1
    if isinstance(error, McsdError):
        message, hint, code = error.message, error.hint or "see mcsd --help", error.exit_code
    elif isinstance(error, TyperException):
        context = getattr(error, "ctx", None)
        message, code = error.format_message(), error.exit_code
        hint = f"see {context.command_path if context else 'mcsd'} --help"
    else:
        message, hint = f"{type(error).__name__}: {error}", "add --debug to see the traceback"
    print(f"error: {_line(message)}\nhint: {_line(hint)}", file=sys.stderr)
    return code


def _line(text: str) -> str:
    return escape_control_characters(" ".join(text.split()))


def fetch(name: str) -> Path:
    """Download a model with `mcsd.loading.catalog.pull`, with a progress bar on stderr if that is a terminal."""
    if is_pulled(name):
        return path_of(name)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"pulling {name}", total=CATALOG[name].size)
        return pull(name, lambda written, size: bar.update(task, completed=written))


def fetch_missing(*names: str | Path | None) -> None:
    """`fetch` the names that are in the catalog, and check that the others exist; None and "ngram" are no models.

    Raises:
        UnknownModel: there is no such model.
    """
    for name in names:
        if name in CATALOG:
            fetch(str(name))
        elif name is not None and name != "ngram":
            locate(name)


class ProgressDisplay:
    """Progress on stderr: a status line, if that is a terminal, and permanent lines."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(file=sys.stderr, highlight=False)
        self._status = self._console.status("starting")

    def update(self, line: str) -> None:
        """Replace the status line."""
        self._status.update(line)

    def log(self, line: str) -> None:
        """Print a permanent line."""
        self._console.print(line, soft_wrap=True, markup=False)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show the status line during the block; progress bars of libraries are hidden."""
        status = self._status if self._console.is_terminal else nullcontext()
        with status, nullcontext() if debug_enabled.get() else redirect_stderr(io.StringIO()):
            yield


@contextmanager
def spinner(what: str) -> Iterator[None]:
    """Show a spinner on stderr, if that is a terminal, instead of the progress bars of libraries."""
    from rich.console import Console

    if debug_enabled.get():
        yield
        return
    console = Console(file=sys.stderr)
    with redirect_stderr(io.StringIO()), console.status(what) if console.is_terminal else nullcontext():
        yield


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide warnings of libraries; print warnings of mcsd as one line each."""
    stderr = sys.stderr

    def one_line(message: Warning | str, *_: Any) -> None:
        print(f"warning: {escape_control_characters(str(message))}", file=stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", McsdWarning)
        warnings.showwarning = one_line  # type: ignore[assignment]
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
