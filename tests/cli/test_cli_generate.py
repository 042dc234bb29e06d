"""`mcsd generate` end to end: processes, pipes, signals; real weights with and without --json."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mcsd.cli import main
from mcsd.loading.catalog import Location
from support.cli import Run, start

PROMPT = "Once upon a time"


def test_streamed_text_is_the_json_text_on_real_weights(smollm2_location: Location) -> None:
    words = ["generate", "-n", 12, "--seed", 3, "--draft", "ngram", "--scheme", "mcss-wor", "--tree", "2x1", "--raw"]
    # Both together: loading the weights takes most of the time.
    streaming = start(*words, PROMPT)
    with_json = start(*words, "-", "--json", stdin=subprocess.PIPE)
    out, err = streaming.communicate(timeout=300)
    assert streaming.returncode == 0, err
    assert "12 tokens" in err.splitlines()[0]
    assert [line for line in err.splitlines()[1:] if not line.startswith("hint: there is no draft")] == []  # no bars

    json_out, err = with_json.communicate(f"{PROMPT}\n", timeout=300)
    assert (with_json.returncode, err) == (0, "")
    value = json.loads(json_out)
    assert out == value["text"] + "\n"
    assert len(value["text"].strip()) > 12  # twelve tokens of a real model are words
    assert len(value["token_ids"]) == 12
    assert value["finish_reason"] == "length"
    assert value["usage"] == {"prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16}
    decoding = value["speculative_decoding"]
    assert decoding["tree"] == "2x1"
    assert sum(decoding["acceptance_histogram"]) == decoding["target_calls"]
    assert decoding["mean_acceptance_length"] == pytest.approx(12 / decoding["target_calls"])
    parts = {part: value["timing"][part] for part in ("prefill", "draft", "target", "judge", "other")}
    assert value["timing"]["seconds"] == pytest.approx(sum(parts.values()))
    assert value["timing"]["tokens_per_second"] == pytest.approx(12 / value["timing"]["seconds"])


@pytest.fixture
def words(tiny: Path) -> list[object]:
    """Draft and target are the same model, so that many candidates are accepted."""
    model = ["-m", tiny, "-md", tiny, "--tree", "2x2", "--dtype", "float32", "--ignore-eos"]
    return ["generate", PROMPT, *model, "--raw", "--seed", 1]


def test_the_same_seed_gives_the_same_text_with_colors_too(run: Run, words: list[object]) -> None:
    plain = run(*words, "-n", 9)
    value = json.loads(run(*words, "-n", 9, "--json").out)
    colored = run(*words, "-n", 9, "--color")
    assert plain.code == colored.code == 0
    assert plain.out == value["text"] + "\n"
    assert value["speculative_decoding"]["accepted_tokens"] > 0
    assert "\x1b[32m" in colored.out
    assert "\x1b[1m" in colored.out
    for code in ("\x1b[32m", "\x1b[1m", "\x1b[0m"):
        colored = colored._replace(out=colored.out.replace(code, ""))
    assert colored.out == plain.out
    legend, summary = colored.err.splitlines()
    assert "accepted candidates" in legend
    assert "cut at 9 tokens" in summary
    assert run(*words[:-1], 2, "-n", 9).out != plain.out


def test_stop_strings_and_plain_decoding(run: Run, words: list[object]) -> None:
    words = [*words, "--tree", "none", "--temperature", 0, "-n", 12]
    text = run(*words).out
    stopped = json.loads(run(*words, "--stop", text[5:9], "--json").out)
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == text[: text.index(text[5:9])]
    assert stopped["speculative_decoding"]["draft_tokens"] == 0


def test_a_closed_pipe_ends_it_quietly(words: list[object]) -> None:
    running = start(*words, "-n", 2000)
    assert running.stdout
    assert running.stderr
    assert running.stdout.read(3)
    running.stdout.close()
    with running.stderr:
        assert running.stderr.read() == ""
    assert running.wait(60) == 0


def test_ctrl_c_ends_it_in_one_line(words: list[object]) -> None:
    running = start(*words, "-n", 2000)
    assert running.stdout
    assert running.stdout.read(3)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err == "error: interrupted\n"
    assert out.endswith("\n")


def test_a_full_disk_is_a_one_line_error(words: list[object]) -> None:
    with open("/dev/full", "w") as full:
        running = start(*words, "-n", 4, stdout=full)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 1
    assert err.startswith("error: writing failed: No space left on device\nhint: free some space")
    assert len(err.splitlines()) == 2


def test_an_output_without_the_characters_of_the_text_is_named(
    words: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random text has characters that ASCII lacks. JSON is ASCII."""
    command = [*map(str, words), "-n", "60", "--temperature", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert main(command) == 1
        first, _ = capsys.readouterr().err.splitlines()
    assert first.startswith("error: the output is ascii, which has no '\\")
    assert main([*command, "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["text"].isascii()


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_bytes_that_are_no_text_are_named(locale: str) -> None:
    """In the C locale Python reads any bytes."""
    environment = os.environ | {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "mcsd", "generate", "-"]
    done = subprocess.run(command, env=environment, input=b"abc\xff", capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"error: the prompt is not UTF-8 text\n")


def test_a_warning_is_one_line(run: Run, tiny: Path) -> None:
    words = ["generate", "Once", "-m", tiny, "--tree", "none", "-n", 4, "--temperature", 0, "--dtype", "float32"]
    plain, compiled = run(*words), run(*words, "--compile")
    warning, *rest = compiled.err.splitlines()
    assert warning == "warning: compile has no effect yet"
    assert len(rest) == len(plain.err.splitlines())
    assert (compiled.code, compiled.out) == (0, plain.out)
