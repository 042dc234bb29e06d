"""``mcsd chat``: a conversation in the terminal, or with one message per line from a pipe."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

from mcsd.cli.options import Color, Json, SamplingArguments, command, load_engine
from mcsd.cli.output import completion_json, print_color_legend, print_error, print_json, summary, write_stream
from mcsd.config import EngineOptions
from mcsd.errors import InvalidParameter, RequestError
from mcsd.params import SamplingParams

if TYPE_CHECKING:
    from mcsd.engine import Engine


@command
def chat(
    *,
    engine: EngineOptions,
    sampling: SamplingArguments,
    color: Color = False,
    json: Json = False,
) -> None:
    """Chat with a model. /reset starts a new conversation; /exit or Ctrl-D quits; Ctrl-C stops an answer.

    With piped input each line is a message. With --json each answer is one JSON object on one line.
    """
    params = sampling.params()
    loaded = load_engine(replace(engine, max_batch=1))
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        print("/reset starts a new conversation, /exit quits", file=sys.stderr)
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() its line editing)
    if color and not json:
        print_color_legend()
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
                print_error(error)
                history.pop()
            else:
                history.append({"role": "assistant", "content": answer})


def _messages(interactive: bool) -> Iterator[str]:
    """The user's messages, until Ctrl-D, Ctrl-C or the end of the pipe."""
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
    """Write the answer to stdout and return its text, which may be incomplete after Ctrl-C."""
    text, done = "", None
    with _interruptible() as interrupted:
        chunks = engine.stream_chat(history, params)
        for chunk in chunks if json else write_stream(chunks, color):
            text, done = text + chunk.text, chunk.completion
            if interrupted:
                break
    if done and json:
        print_json(completion_json(engine, done))
    elif done:
        print(summary(engine, done), file=sys.stderr)
    return text


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Record the first Ctrl-C in a list, so that the engine finishes its step; the second one interrupts."""
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
