"""`mcsd chat`, from a pipe and in a terminal."""

import json
import os
import pty
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cli import Run, assert_one_line_error, start


@pytest.fixture
def words(tiny: Path) -> list[object]:
    return ["chat", "-m", tiny, "--dtype", "float32", "--ignore-eos", "--seed", 1, "-n", 6]


def answers(run: Run, words: list[object], *lines: str) -> list[dict[str, dict[str, int]]]:
    result = run(*words, "--json", stdin="".join(f"{line}\n" for line in lines))
    assert (result.code, result.err) == (0, "")
    return [json.loads(line) for line in result.out.splitlines()]


def test_each_piped_line_is_answered_within_the_conversation(run: Run, words: list[object]) -> None:
    first, second = answers(run, words, "hello", "", "hello", "/exit", "hello")
    # The second prompt contains the first answer of six tokens.
    assert second["usage"]["prompt_tokens"] >= first["usage"]["prompt_tokens"] + 6


def test_reset_starts_a_new_conversation(run: Run, words: list[object]) -> None:
    first, second = answers(run, words, "hello", "/reset", "hello")
    for answer in (first, second):
        del answer["timing"]
    assert first == second


def test_text_goes_to_stdout_and_the_rest_to_stderr(run: Run, words: list[object]) -> None:
    (answer,) = answers(run, words, "hello")
    result = run(*words, stdin="hello\n")
    assert result.out == f"{answer['text']}\n"
    assert result.err.startswith("6 tokens in ")


def test_a_piped_conversation_fails_when_it_is_too_long(run: Run, words: list[object]) -> None:
    assert_one_line_error(run(*words, "--max-length", 20, stdin="hello " * 50), 2, "20")


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, words: list[object]) -> None:
        self._master, slave = pty.openpty()
        # Errors go to the same screen.
        self.process = start(*words, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str) -> str:
        """Read up to this text, and return the text before it."""
        end = time.monotonic() + 60
        while text not in self.screen:
            assert time.monotonic() < end, self.screen
            self.screen += os.read(self._master, 4096).decode(errors="replace")
        before, _, self.screen = self.screen.partition(text)
        return before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(words: list[object]) -> Iterator[Terminal]:
    terminal = Terminal([*words[:-1], 4000, "--max-length", 4200])
    yield terminal
    terminal.close()


def test_in_a_terminal_ctrl_c_stops_the_answer_and_then_the_chat(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("hello\n")
    terminal.wait_for("hello\r\n")
    while not terminal.screen.strip():
        terminal.screen += os.read(terminal._master, 4096).decode(errors="replace")
    terminal.process.send_signal(signal.SIGINT)
    assert "tokens in" not in terminal.wait_for("\r\n> ")
    # A prompt that is too long does not end the conversation.
    terminal.type("word " * 800 + "\n")
    terminal.type("word " * 800 + "\n")
    terminal.type("/reset\n")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.process.wait(60) == 0
