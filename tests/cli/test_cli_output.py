"""Colors, control characters, the summary, JSON and errors."""

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mcsd.cli.output import completion_json, escape_control_characters, print_error, summary, write_stream
from mcsd.errors import InvalidTree, WeightsCorrupt
from mcsd.results import Chunk, Completion, Stats

SECONDS = {"prefill": 0.1, "draft": 0.8, "target": 1.0, "judge": 0.1, "other": 0.1}
STATS = Stats(9, 64, 22, 220, 42, (3, 5, 14), SECONDS)
DONE = Completion("a\x1b]0;b", tuple(range(64)), "length", None, STATS)
CHUNKS = [Chunk("a\x1b]0;b", (1, 2, 3), 2, ("a", "\x1b]0;", "b")), Chunk("\tc\n", (4,), 0, ("\tc\n",), DONE)]
ENGINE: Any = SimpleNamespace(
    scheme_name="mcss-wor", tree="2x2x1", draft_name="head", plain_seconds=None, max_length=999
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stdout: io.StringIO, color: bool) -> str:
    monkeypatch.setattr(sys, "stdout", stdout)
    assert list(write_stream(CHUNKS, color)) == CHUNKS
    return stdout.getvalue()


def test_a_pipe_gets_the_text_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, io.StringIO(), color=False) == "a\x1b]0;b\tc\n\n"


def test_a_terminal_gets_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, Terminal(), color=False) == "a\\x1b]0;b\tc\n\x1b[2m […]\x1b[0m\n"


def test_candidates_and_the_targets_tokens_have_different_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    green, bold, plain = "\x1b[32m", "\x1b[1m", "\x1b[0m"
    expected = f"{green}a{plain}{green}\\x1b]0;{plain}{bold}b{plain}{bold}\tc\n{plain}\x1b[2m […]{plain}\n"
    assert shown(monkeypatch, Terminal(), color=True) == expected


def test_an_interrupted_text_ends_with_a_newline(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    chunks = write_stream(CHUNKS, color=False)
    next(iter(chunks))
    del chunks
    assert stdout.getvalue() == "a\x1b]0;b\n"


def test_control_characters_are_escaped_and_text_is_kept() -> None:
    assert escape_control_characters("naïve 日本\n\t🙂") == "naïve 日本\n\t🙂"
    assert escape_control_characters("\x00\x07\r\x1b[2J\x7f\x9b") == "\\x00\\x07\\x0d\\x1b[2J\\x7f\\x9b"


def test_summary_has_speed_and_acceptance() -> None:
    assert summary(ENGINE, DONE) == "30 tokens/s · 2.9 tokens per step · cut at 64 tokens (-n sets the limit)"
    ended = Completion("", (), "stop", None, Stats(9, 1, 1, 0, 0, (1,), SECONDS))
    assert summary(ENGINE, ended) == "0.5 tokens/s · 1.0 tokens per step"


def test_summary_compares_with_plain_decoding_where_its_speed_is_known() -> None:
    calibrated: Any = SimpleNamespace(**{**vars(ENGINE), "plain_seconds": 0.05})
    # 64 plain steps of 50 ms after the same prefill of 0.1 s: 3.3 s instead of 2.1 s.
    assert "30 tokens/s · 1.6× plain decoding · 2.9 tokens per step" in summary(calibrated, DONE)


def test_a_hint_where_n_grams_do_not_help() -> None:
    without_draft: Any = SimpleNamespace(**{**vars(ENGINE), "draft_name": "ngram"})
    assert "hint" not in summary(without_draft, DONE)
    slow = Completion("", (), "stop", None, Stats(9, 12, 11, 40, 1, (10, 1), SECONDS))
    assert "`mcsd distill` makes a draft" in summary(without_draft, slow).splitlines()[1]
    assert "hint" not in summary(ENGINE, slow)


def test_json_has_the_keys_of_the_contract() -> None:
    value = completion_json(ENGINE, DONE)
    assert list(value) == ["text", "token_ids", "finish_reason", "usage", "speculative_decoding", "timing"]
    assert value["usage"] == {"prompt_tokens": 9, "completion_tokens": 64, "total_tokens": 73}
    assert value["speculative_decoding"] == {
        "scheme": "mcss-wor",
        "tree": "2x2x1",
        "mean_acceptance_length": 64 / 22,
        "draft_acceptance_rate": 42 / 220,
        "acceptance_histogram": [3, 5, 14],
        "target_calls": 22,
        "draft_tokens": 220,
        "accepted_tokens": 42,
    }
    assert value["timing"] == {"seconds": pytest.approx(2.1), "tokens_per_second": pytest.approx(64 / 2.1), **SECONDS}


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InvalidTree("tree\n'x'", "give\nanother"), 2, "error: tree 'x'\nhint: give another\n"),
        (WeightsCorrupt("bad\x1b[2J", "again"), 1, "error: bad\\x1b[2J\nhint: again\n"),
        (ValueError("a\nb"), 1, "error: ValueError: a b\nhint: add --debug to see the traceback\n"),
    ],
)
def test_errors_are_one_line_and_a_hint(
    error: Exception, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert print_error(error) == code
    assert capsys.readouterr() == ("", text)
