"""``mcsd chat``: a conversation in the terminal, or with one message per line from a pipe."""

import json as json_library
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from mcsd.cli.options import Color, Json, SamplingArguments, System, command, load_engine
from mcsd.cli.output import completion_json, print_color_legend, print_error, print_json, summary, write_stream
from mcsd.config import EngineOptions
from mcsd.errors import InvalidOption, InvalidParameter, McsdError

if TYPE_CHECKING:
    from mcsd.engine import Engine

_HELP = """\
/help           this list
/reset          start a new conversation
/system TEXT    start a new conversation with this system prompt; without TEXT, with none
/save FILE      write the conversation to a JSON file
/exit           quit (or Ctrl-D); Ctrl-C stops an answer"""

_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?")


@command
def chat(
    *,
    engine: EngineOptions,
    sampling: SamplingArguments,
    system: System = None,
    color: Color = None,
    json: Json = False,
) -> None:
    """Chat with a model. /help lists the commands; Ctrl-C stops an answer, Ctrl-D quits.

    With piped input each line is a message or a command; an error ends it. With --json each answer is one JSON object.

    Examples:

    mcsd chat

    mcsd chat -m qwen2.5-coder-1.5b --system "Answer in one sentence."
    """
    fields = sampling.given()
    loaded = load_engine(replace(engine, max_batch=1))
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        print(f"{loaded.target_name}, draft {loaded.draft_name}; /help lists the commands", file=sys.stderr)
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() its line editing)
    if color and not json:
        print_color_legend()
    # Answers end by themselves, or with the context.
    conversation = _Conversation(loaded, {"max_new_tokens": loaded.max_length} | fields, bool(color), json)
    conversation.start(system)
    for message in _messages(interactive):
        try:
            if not conversation.take(message):
                break
        except McsdError as error:
            if not interactive:
                raise
            print_error(error)


class _Conversation:
    """The messages so far, and how answers are made and shown."""

    def __init__(self, engine: "Engine", fields: dict[str, Any], color: bool, json: bool) -> None:
        self._engine, self._fields, self._color, self._json = engine, fields, color, json
        self._messages: list[dict[str, str]] = []

    def start(self, system: str | None) -> None:
        """Begin anew."""
        self._messages = [{"role": "system", "content": system}] if system else []

    def take(self, line: str) -> bool:
        """Answer a message, or carry out a command; whether the conversation goes on.

        Raises:
            McsdError: the request failed, or there is no such command; the conversation is as before.
        """
        found = _COMMAND.fullmatch(line)
        name, text = (found[1], (found[2] or "").strip()) if found else ("", "")
        if not found or (text and name not in ("system", "save")):
            if line:
                self._answer(line)
            return True
        if name == "exit":
            return False
        if name == "help":
            print(_HELP, file=sys.stderr)
        elif name == "reset":
            self.start(next((one["content"] for one in self._messages if one["role"] == "system"), None))
            print("a new conversation", file=sys.stderr)
        elif name == "system":
            self.start(text)
            print("a new conversation", file=sys.stderr)
        elif name == "save":
            self._save(text)
        else:
            raise InvalidOption(f"there is no command /{name}", "/help lists them")
        return True

    def _save(self, file: str) -> None:
        if not file:
            raise InvalidOption("/save needs the name of a file", "/save conversation.json")
        from mcsd.files import save_text

        try:
            path = Path(file).expanduser()
            if path.exists():
                raise InvalidOption(f"{path} exists", "give another name")
            save_text(path, json_library.dumps(self._messages, indent=1) + "\n")
        except (RuntimeError, ValueError) as error:
            raise InvalidOption(f"{file!r:.80} is not a file name: {error}", "/save conversation.json") from error
        print(f"saved to {path}", file=sys.stderr)

    def _answer(self, message: str) -> None:
        self._messages.append({"role": "user", "content": message})
        try:
            answer = self._write()
        except McsdError:
            self._messages.pop()
            raise
        self._messages.append({"role": "assistant", "content": answer})

    def _write(self) -> str:
        """Write the answer to stdout and return its text, which may be incomplete after Ctrl-C."""
        text, done = "", None
        with _interruptible() as interrupted:
            chunks = self._engine.stream_chat(self._messages, **self._fields)
            for chunk in chunks if self._json else write_stream(chunks, self._color):
                text, done = text + chunk.text, chunk.completion
                if interrupted:
                    break
        if done and self._json:
            print_json(completion_json(self._engine, done))
        elif done:
            print(summary(self._engine, done), file=sys.stderr)
        return text


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
