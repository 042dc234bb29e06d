"""Offline batches: answers are those of the server, in order, and errors of one request stay its own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch

import mcsd
from mcsd.batch_files import BatchOptions, run_batch
from mcsd.batch_files.answers import answers
from mcsd.batch_files.lines import Line
from mcsd.errors import DataError, InvalidOption, StepFailed
from mcsd.models import ModelOutput
from support.batches import CHAT, RESPONSES, TEXT, read_answers, request, same_parts, write_lines
from support.server import Table, running, table_engine

TALK = [{"role": "user", "content": "abc"}]
BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": TALK, "max_tokens": 9, "seed": 1}),
    (CHAT, {"messages": TALK, "max_tokens": 9, "temperature": 0, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {"messages": TALK, "max_tokens": 5, "seed": 3, "n": 3, "return_token_ids": True}),
    (TEXT, {"prompt": ["ab", "cd"], "seed": 4}),
    (TEXT, {"prompt": [1, 2, 3], "seed": 4, "logprobs": 1, "stop": "a"}),
    (RESPONSES, {"input": "abc", "max_output_tokens": 7, "seed": 5}),
    (CHAT, {"messages": TALK, "model": "another", "seed": 1}),
    (CHAT, {"messages": TALK, "temperature": 3, "seed": 1}),
    (CHAT, {"messages": TALK, "unknown": 3, "seed": 1}),
    (CHAT, {"messages": TALK, "n": 100, "seed": 1}),
    (CHAT, {"messages": [], "seed": 1}),
    (CHAT, {"messages": [{"role": "user", "content": "a" * 5000}], "seed": 1}),
    (CHAT, {"messages": [{"role": "user", "content": "\N{SNOWMAN}\u2028"}], "seed": 1, "max_tokens": 4}),
    (TEXT, {"prompt": "", "seed": 1}),
    (TEXT, {"prompt": "a", "regex": "(", "seed": 1}),
    (TEXT, {"prompt": "a" * (3 << 20), "seed": 1}),
    (RESPONSES, {"input": "abc", "background": True, "seed": 1}),
]


@pytest.fixture
def files(tmp_path: Path) -> BatchOptions:
    return BatchOptions(tmp_path / "requests.jsonl", tmp_path / "answers.jsonl")


def run(files: BatchOptions, lines: list[str], engine: mcsd.Engine | None = None) -> list[dict[str, Any]]:
    write_lines(files.input, lines)
    run_batch(files, lambda: engine or table_engine())
    return read_answers(files.output)


def test_answers_are_those_of_the_server(files: BatchOptions) -> None:
    given = run(files, [request(f"r{i}", url, body) for i, (url, body) in enumerate(BODIES)])
    with running(table_engine(), max_wait_seconds=60) as server:
        for (url, body), answer in zip(BODIES, given, strict=True):
            served = httpx.post(server.url + url, json=body, timeout=60)
            assert answer["response"]["status_code"] == served.status_code, body
            assert same_parts(answer["response"]["body"]) == same_parts(served.json())
    statuses = [answer["response"]["status_code"] for answer in given]
    assert (statuses.count(200), statuses.count(400), statuses.count(404), statuses.count(413)) == (7, 8, 1, 1)


def test_the_format_and_the_order(files: BatchOptions) -> None:
    lengths = [300, 1, 50, 2, 9, 200, 3, 1, 1, 40]
    lines = [request(f"r{i}", TEXT, {"prompt": "a", "max_tokens": n}) for i, n in enumerate(lengths)]
    given = run(files, ["", *lines, "  "])
    assert [answer["custom_id"] for answer in given] == [f"r{i}" for i in range(10)]
    assert [answer["response"]["body"]["usage"]["completion_tokens"] for answer in given] == lengths
    for answer in given:
        assert list(answer) == ["id", "custom_id", "response", "error"]
        assert list(answer["response"]) == ["status_code", "request_id", "body"]
        assert answer["id"].startswith("batch_req_")
        assert answer["error"] is None
    assert len({answer["id"] for answer in given}) == len({answer["response"]["body"]["id"] for answer in given}) == 10
    # Requests without a seed have seeds of their own.
    assert len({answer["response"]["body"]["choices"][0]["text"] for answer in given}) > 5


@pytest.mark.parametrize(
    ("line", "status", "param"),
    [
        (request("x", "/v1/embeddings", {"input": "a"}), 404, "url"),
        (request("x", "/metrics", {}), 404, "url"),
        (request("x", CHAT, {"messages": TALK}, "GET"), 400, "method"),
        (request("x", CHAT, [1]), 400, "body"),
        ('{"custom_id": "x"}', 400, "method"),
        ('{"custom_id": "x", "method": "POST", "url": ["/v1/completions"], "body": {}}', 404, "url"),
        (request("x", CHAT, {"messages": TALK, "stream": True}), 400, "stream"),
        (request("x", CHAT, {"messages": TALK, "seed": "one"}), 400, "seed"),
        ('{"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"prompt": NaN}}', 400, None),
        ('{"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"prompt": "\\ud800"}}', 400, None),
    ],
)
def test_a_wrong_line_is_answered_and_the_others_go_on(
    line: str, status: int, param: str | None, files: BatchOptions
) -> None:
    good = [request(f"r{i}", TEXT, {"prompt": "a", "max_tokens": 2}) for i in range(2)]
    given = run(files, [good[0], line, good[1]])
    assert [answer["response"]["status_code"] for answer in given] == [200, status, 200]
    assert given[1]["response"]["body"]["error"]["param"] == param


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (["nonsense"], "line 1 is not JSON"),
        ([request("a", TEXT, {}), "[" * 100000], "line 2 is not JSON"),
        (["[1]"], "line 1 is no JSON object"),
        (['{"method": "POST"}'], "line 1 has no custom_id"),
        (['{"custom_id": 3}'], "line 1 has no custom_id"),
        ([request("a", TEXT, {}), "", request("b", TEXT, {}), request("a", CHAT, {})], "custom_id 'a' twice"),
        ([], "has no requests"),
        ([" " * (1 << 25)], "line 1 is longer"),
    ],
)
def test_a_file_that_is_no_batch_is_refused(lines: list[str], error: str, files: BatchOptions) -> None:
    with pytest.raises(DataError, match=error):
        run(files, lines)
    assert not files.output.exists()


def test_files_that_cannot_be_used(files: BatchOptions) -> None:
    with pytest.raises(DataError, match="is no file"):
        run_batch(files)
    write_lines(files.input, [request("a", TEXT, {"prompt": "a"})])
    with pytest.raises(InvalidOption, match="is the input, too"):
        run_batch(BatchOptions(files.input, files.input))


class Faulty(Table):
    """Fails where it reads a "!"."""

    def forward(self, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> ModelOutput:
        if (tokens == 0).any():
            raise RuntimeError("broken")
        return super().forward(tokens, *args, **kwargs)


def test_a_failed_step_is_the_answer_of_its_request(files: BatchOptions) -> None:
    engine = table_engine(Faulty())
    assert engine.tokenizer("!")["input_ids"] == [0]
    # Nothing draws the token.
    bias = {"logit_bias": {"0": -100.0}, "max_tokens": 20, "seed": 1}
    prompts = ["ab", "a!b", "c", "d", "e!", "f"]
    given = run(files, [request(text, TEXT, {"prompt": text, **bias}) for text in prompts], engine)
    assert [answer["response"]["status_code"] for answer in given] == [200, 500, 200, 200, 500, 200]
    assert given[1]["response"]["body"]["error"]["code"] == "step_failed"


def test_an_engine_that_cannot_step_answers_nothing(files: BatchOptions) -> None:
    table = Table()

    def fail() -> None:
        raise RuntimeError("broken")

    table.before = fail
    lines = [request(f"r{i}", TEXT, {"prompt": "a"}) for i in range(20)]
    with pytest.raises(StepFailed, match="RuntimeError"):
        # A calibration comes before the first step.
        run(files, lines, table_engine(table, tree="auto"))
    assert files.output.read_bytes() == b""
    assert len(run(files, lines)) == 20


def test_the_batch_is_full_and_few_lines_are_read_ahead() -> None:
    engine = table_engine(max_batch=2)
    sizes: list[int] = []
    engine.target.before = lambda: sizes.append(len(engine._running))  # type: ignore[attr-defined]
    read = 0

    def lines() -> Iterator[Line]:
        nonlocal read
        for i in range(300):
            read += 1
            length = 900 if i == 50 else 5 + i % 7
            yield Line.of(request(f"r{i}", TEXT, {"prompt": "a", "max_tokens": length}).encode(), b"key")

    ahead = []
    for done, answer in enumerate(answers(engine, lines())):
        assert json.loads(answer.text)["custom_id"] == f"r{done}"
        assert (answer.failed, answer.tokens) == (False, 900 if done == 50 else 5 + done % 7)
        ahead.append(read - done)
    assert len(ahead) == 300
    assert 64 < max(ahead) <= 129
    assert ahead[0] < 20
    assert sum(size == 2 for size in sizes) > 0.75 * len(sizes)
