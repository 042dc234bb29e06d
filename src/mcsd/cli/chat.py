"""``mcsd chat``: a conversation in the terminal, or line by line from a pipe."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from mcsd.cli.options import Color, EngineOptions, Json, SamplingOptions, command
from mcsd.cli.output import as_object, legend, print_json, report, show, summary
from mcsd.errors import InvalidParameter, RequestError
from mcsd.params import SamplingParams

if TYPE_CHECKING:
    from mcsd.engine import Engine


@command
def chat(
    *,
    engine: EngineOptions,
    sampling: SamplingOptions,
    color: Color = False,
    json: Json = False,
) -> None:
    """Talk with a model. /reset forgets the conversation; /exit or Ctrl-D ends it; Ctrl-C stops an answer.

    With piped input each line is a message. With --json each answer is one object on a line of its own.
    """
    params = sampling.params()
    loaded = engine.load()
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        print("/reset forgets the conversation, /exit ends it", file=sys.stderr)
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() its line editing)
    if color and not json:
        legend()
    history: list[dict[str, str]] = []
    for message in _messages(interactive):
        if message == "/exit":
            break
        if message == "/reset":
            history.clear()
        elif message:
            history.append({"role": "user", "content": message})
            try:
                answer = _answer(loaded, history, params, color, json)
            except RequestError as error:
                if not interactive:
                    raise
                report(error)
                history.pop()
            else:
                history.append({"role": "assistant", "content": answer})


def _messages(interactive: bool) -> Iterator[str]:
    """What the user types, until Ctrl-D, Ctrl-C or the end of the pipe."""
    try:
        while True:
            line = input("> ") + "\n" if interactive else sys.stdin.readline()
            line.encode()
            if not line:
                return
            yield line.strip()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
    except UnicodeError as error:
        raise InvalidParameter("the message is not UTF-8 text", "convert it, for example with iconv") from error


def _answer(engine: "Engine", history: list[dict[str, str]], params: SamplingParams, color: bool, json: bool) -> str:
    """Answer on stdout and return the text, as far as it came."""
    text, done = "", None
    with _interruptible() as interrupted:
        chunks = engine.stream_chat(history, params)
        for chunk in chunks if json else show(chunks, color):
            text, done = text + chunk.text, chunk.completion
            if interrupted:
                break
    if done and json:
        print_json(as_object(engine, done))
    elif done:
        print(summary(engine, done), file=sys.stderr)
    return text


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Let Ctrl-C fill a list, so that the engine finishes its step; pressed again, it interrupts as ever."""
    pressed: list[int] = []

    def press(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
