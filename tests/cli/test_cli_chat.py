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
    assert result.code == 0
    assert [line for line in result.err.splitlines() if not line.startswith(("saved to ", "a new "))] == []
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
    assert "cut at 6 tokens" in result.err


def test_commands_of_the_chat(run: Run, words: list[object], tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    (first, second, third) = answers(
        run, words, "hello", "/system Be brief.", "hello", f"/save {file}", "/reset", "hello"
    )
    assert second["usage"]["prompt_tokens"] != first["usage"]["prompt_tokens"]
    assert second["usage"] == third["usage"]  # /reset keeps the system prompt
    saved = json.loads(file.read_text())
    assert [one["role"] for one in saved] == ["system", "user", "assistant"]
    assert saved[0]["content"] == "Be brief."
    assert saved[2]["content"] == second["text"]
    given = answers(run, [*words, "--system", "Be brief."], "hello")
    assert given[0]["text"] == second["text"]


def test_help_and_unknown_commands(run: Run, words: list[object]) -> None:
    result = run(*words, stdin="/help\n")
    assert (result.code, result.out) == (0, "")
    assert all(name in result.err for name in ("/reset", "/system", "/save", "/exit"))
    assert_one_line_error(run(*words, stdin="/nonsense\n"), 2, "/nonsense")
    assert_one_line_error(run(*words, stdin="/save\n"), 2, "/save")
    # A path is a message.
    assert run(*words, stdin="/etc/hosts: what is it?\n").code == 0


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
    assert "per step" not in terminal.wait_for("\r\n> ")
    # A prompt that is too long does not end the conversation.
    terminal.type("word " * 800 + "\n")
    terminal.type("word " * 800 + "\n")
    terminal.type("/reset\n")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.process.wait(60) == 0
