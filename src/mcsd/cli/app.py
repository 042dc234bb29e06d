"""The application: its commands and exit codes. 0 done, 1 the work failed, 2 the command line was wrong."""

import errno
import gc
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from mcsd.cli.batch import batch
from mcsd.cli.bench import bench
from mcsd.cli.cache import cache
from mcsd.cli.chat import chat
from mcsd.cli.distill import distill
from mcsd.cli.generate import generate
from mcsd.cli.models import models
from mcsd.cli.output import debug_enabled, print_error
from mcsd.cli.pull import pull
from mcsd.cli.serve import serve
from mcsd.cli.tune import tune
from mcsd.cli.verify import verify
from mcsd.errors import OutputFailed

INTERRUPTED = 130
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_COMPLETION = "_MCSD_COMPLETE"
"""Set in the environment when a shell asks for completions."""

app = typer.Typer(
    name="mcsd",
    help="Multi-candidate speculative decoding: faster LLM inference with an unchanged output distribution.",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Example: mcsd generate "Tell me the capital of France."',
)
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command()(batch)
app.command()(tune)
app.command()(bench)
app.command()(distill)
app.command()(verify)
app.command()(models)
app.command()(pull)
app.command()(cache)


def _version(wanted: bool) -> None:
    if wanted:
        from mcsd import __version__

        print(f"mcsd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = (False),
) -> None:
    pass


def run() -> None:
    """Run the command line of this process, and exit."""
    if _COMPLETION in os.environ:
        app()
    code = main()
    # A last collection would look at all objects of the libraries, which takes a second and frees nothing.
    gc.freeze()
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return the exit code. Errors are printed as one line and a hint.

    Args:
        arguments: those after ``mcsd``; None takes the process's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = get_command(app)
    debug_enabled.set(False)
    try:
        # Not app(), which prints errors and handles Ctrl-C in its own way.
        with command.make_context("mcsd", words or ["--help"]) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as done:
        return done.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe.
        _discard_output()
    except Exception as error:
        if isinstance(error, OSError):
            _discard_output()
        return print_error(_output_error(error) or error)
    return 0


def _output_error(error: Exception) -> OutputFailed | None:
    """The error of a text that cannot be written; None if the error has another cause."""
    failed: OutputFailed | None = None
    if isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8":
        character = error.object[error.start]
        failed = OutputFailed(
            f"the output is {error.encoding}, which has no {character!a}", "set PYTHONIOENCODING=utf-8, or use --json"
        )
    elif isinstance(error, OSError) and error.errno in _DISK_FULL:
        failed = OutputFailed(f"writing failed: {error.strerror}", "free some space, or write elsewhere")
    if failed:
        failed.__cause__ = error
    return failed


def _discard_output() -> None:
    """Discard unwritten output; else Python tries to write it, and fails, again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
