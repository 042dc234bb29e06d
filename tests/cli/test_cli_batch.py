"""``mcsd batch``: a killed and an interrupted process go on, on a tiny model; an answer of real weights."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest

import mcsd
from support.batches import CHAT, TEXT, read_answers, request, same_parts, write_lines
from support.cli import Run, assert_one_line_error, start


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (["missing.jsonl", "out.jsonl"], 2, "missing.jsonl is no file"),
        (["missing.jsonl", "out.jsonl", "--max-batch", "0"], 2, "max_batch=0"),
        (["missing.jsonl", "out.jsonl", "--seed", "-1"], 2, "seed=-1"),
        (["missing.jsonl", "out.jsonl", "--scheme", "nonsense"], 2, "nonsense"),
        (["missing.jsonl"], 2, "output"),
    ],
)
def test_wrong_words(words: list[str], code: int, error: str, run: Run) -> None:
    assert_one_line_error(run("batch", *words), code, error)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    for name in [name for name in sys.modules if name.startswith(("mcsd.server.", "mcsd.batch_files."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    result = run("batch", "in", "out")
    assert (result.code, 'pip install "mcsd[server]"' in result.err) == (1, True)


LENGTHS = [20 + 5 * (i % 7) for i in range(60)]


@pytest.mark.thorough
def test_a_process_that_is_killed_or_interrupted_goes_on(tiny: Path, tmp_path: Path, run: Run) -> None:
    """Half of the requests have no seed; all are sampled, from few tokens.

    Random weights make thousands of tokens almost equally probable, so that rounding in another batch changes texts.
    """
    lines = []
    for i, length in enumerate(LENGTHS):
        body = {"prompt": f"{i} and", "max_tokens": length, "ignore_eos": True, "top_k": 4}
        body |= {"seed": i} if i % 2 else {}
        lines.append(request(f"r{i}", TEXT, body))
    given, whole, parts = write_lines(tmp_path / "in", lines), tmp_path / "whole", tmp_path / "parts"
    words = ["-m", tiny, "-md", "ngram", "--tree", "2x1", "--max-batch", "4", "--dtype", "float32"]
    result = run("batch", given, whole, *words, "--json")
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    assert (summary["answered"], summary["failed"], summary["tokens"]) == (60, 0, sum(LENGTHS))

    for last, (sign, code) in zip((5, 25), ((signal.SIGKILL, -9), (signal.SIGINT, 130)), strict=True):
        process = start("batch", given, parts, *words)
        while not parts.exists() or parts.read_bytes().count(b"\n") < last:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(sign)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == code, errors
        assert "Traceback" not in errors
        assert last <= parts.read_bytes().count(b"\n") < 60
    result = run("batch", given, parts, *words)
    assert result.code == 0
    assert "60 of 60 answers" in result.err
    assert list(map(same_parts, read_answers(parts))) == list(map(same_parts, read_answers(whole)))
    assert run("batch", given, parts, *words, "--seed", "1").code == 2


@pytest.mark.thorough
def test_answers_of_real_weights_are_those_of_the_engine(tmp_path: Path, run: Run) -> None:
    talk = [{"role": "user", "content": "Tell me the capital of France."}]
    lines = [
        request("chat", CHAT, {"model": "gpt", "messages": talk, "temperature": 0, "max_tokens": 24}),
        request("text", TEXT, {"prompt": "Once upon a time", "seed": 3, "max_tokens": 24}),
        request("name", CHAT, {"model": "smollm2-135m", "messages": talk}),
    ]
    given = write_lines(tmp_path / "in", lines)
    result = run("batch", given, tmp_path / "out", "-m", "smollm2-135m", "--tree", "2x1", "--served-name", "gpt")
    assert result.code == 0, result.err
    assert "3 of 3 answers" in result.err
    assert "1 errors" in result.err
    chat, text, name = (answer["response"] for answer in read_answers(tmp_path / "out"))
    engine = mcsd.Engine.load("smollm2-135m", tree="2x1")
    own = engine.chat(talk, temperature=0, max_new_tokens=24)
    assert "Paris" in own.text
    assert chat["body"]["choices"][0]["message"]["content"] == own.text
    assert chat["body"]["model"] == "gpt"
    assert text["body"]["choices"][0]["text"] == engine.generate("Once upon a time", seed=3, max_new_tokens=24).text
    assert (name["status_code"], name["body"]["error"]["code"]) == (404, "model_not_found")
