"""Under load, faults and signals: every accepted request ends, others are unharmed, and no sequence is left over."""

import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch

from mcsd.errors import InvalidOption
from mcsd.server import ListenOptions, ServerOptions
from mcsd.server.options import check_exposure, read_config
from support.server import Running, Table, post, running, table_engine
from support.threads import LIMIT, Gate, Thread, together, wait_for

MODEL = "tabular"
ENDLESS = json.dumps({"prompt": "x", "max_tokens": 4000, "ignore_eos": True}).encode()


def gated() -> tuple[Table, Gate]:
    target, gate = Table(), Gate()
    target.before = gate
    return target, gate


def complete(server: Running, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 5} | fields, timeout=LIMIT)


def test_texts_under_load_equal_those_of_the_engine_alone() -> None:
    """200 requests of mixed settings from 16 clients; a fifth of them is cancelled at random moments."""
    chance = random.Random(1)
    settings = [
        {
            "seed": chance.randrange(1 << 32),
            "temperature": chance.choice([0.0, 0.7, 1.0, 1.5]),
            "top_p": chance.choice([1.0, 0.9]),
            "max_tokens": chance.randrange(1, 60),
            "presence_penalty": chance.choice([0.0, 0.5]),
            "n": chance.choice([1, 1, 1, 3]),
        }
        for _ in range(200)
    ]
    prompts = ["".join(chance.choices("abcdef \n", k=chance.randrange(1, 80))) for _ in settings]
    leaves = {place: chance.uniform(0, 0.05) for place in chance.sample(range(200), 40)}
    texts: dict[int, list[str]] = {}
    places = iter(range(200))
    with running(table_engine(max_batch=6)) as server:

        def work() -> None:
            with server.client() as client:
                for place in places:
                    try:
                        limit = {"timeout": leaves[place]} if place in leaves else {}
                        done = client.completions.create(model=MODEL, prompt=prompts[place], **settings[place], **limit)
                        texts[place] = [choice.text for choice in done.choices]
                    except openai.APITimeoutError:
                        assert place in leaves

        assert together([work] * 16) == [None] * 16
        server.idle()
        assert server.engine.cache.batch_size == 0
    assert set(range(200)) - set(leaves) <= set(texts)
    engine = table_engine()
    for place, text in texts.items():
        fields = settings[place] | {"max_new_tokens": settings[place]["max_tokens"]}
        del fields["max_tokens"]
        own = engine.generate(prompts[place], **fields)
        assert text == [each.text for each in (own if isinstance(own, list) else [own])], settings[place]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", ["waiting", "running"])
def test_a_client_that_goes_away_frees_its_sequence_within_a_step(stream: bool, stage: str) -> None:
    target, gate = gated()
    with running(table_engine(target, max_batch=1), max_waiting=4) as server:
        body = json.dumps(json.loads(ENDLESS) | {"stream": stream}).encode()
        first = socket.create_connection(server.address)
        first.sendall(post("/v1/completions", body))
        wait_for(gate.reached.is_set)
        if stage == "waiting":
            second = socket.create_connection(server.address)
            second.sendall(post("/v1/completions", body))
            wait_for(lambda: server.status[:2] == (1, 1))
            second.close()
            time.sleep(0.2)  # The server notices while the step waits at the gate.
            gate.open()
            wait_for(lambda: len(server.engine._waiting) == 0 and server.status[:2] == (1, 0))
            assert not server.engine._running[0].done
        first.close()
        time.sleep(0.2)  # The server notices while the step waits at the gate.
        gate.open()
        wait_for(lambda: server.status[:2] == (0, 0))
        assert not server.engine._running
        target.before = lambda: None


def test_a_full_queue_answers_429_at_once_and_accepted_requests_end() -> None:
    target, gate = gated()
    with running(table_engine(target, max_batch=1), max_waiting=2) as server:
        accepted = [Thread(lambda: complete(server).status_code) for _ in range(3)]
        wait_for(lambda: server.status[:2] == (1, 2))
        began = time.monotonic()
        refused = complete(server)
        assert time.monotonic() - began < 1
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        target.before = lambda: None
        gate.open()
        assert [each.result() for each in accepted] == [200] * 3
        assert complete(server).status_code == 200


def test_a_request_that_waits_or_runs_for_too_long_fails_by_name() -> None:
    target, gate = gated()
    options = {"max_wait_seconds": 0.3, "max_run_seconds": 0.3}
    with running(table_engine(target, max_batch=1), **options) as server:
        runs = Thread(lambda: complete(server, max_tokens=4000, ignore_eos=True))
        wait_for(gate.reached.is_set)
        waits = Thread(lambda: complete(server))
        wait_for(lambda: server.status[:2] == (1, 1))
        time.sleep(0.8)
        target.before = lambda: time.sleep(0.01)
        gate.open()
        for thread, word in ((runs, "ran for more"), (waits, "waited for more")):
            answer = thread.result()
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "request_timed_out"
            assert word in answer.json()["error"]["message"]
        server.idle()


def test_a_sequence_without_a_distribution_fails_alone() -> None:
    target = Table()
    engine = table_engine(target)
    (bad,) = engine.tokenizer("~")["input_ids"]
    target._logits[bad] = torch.nan
    with running(engine) as server:
        fields = {"seed": 3, "max_tokens": 40, "logit_bias": {str(bad): -100}}
        good = [lambda: complete(server, **fields)] * 3
        *done, failed = together([*good, lambda: complete(server, prompt="~")])
        assert [answer.status_code for answer in done] == [200] * 3
        assert len({answer.json()["choices"][0]["text"] for answer in done}) == 1
        assert failed.status_code == 500
        assert failed.json()["error"]["code"] == "non_finite_logits"
        streamed = complete(server, prompt="~", stream=True)
        assert "non_finite_logits" in streamed.text
        assert "[DONE]" not in streamed.text
        server.idle()


def test_a_step_that_fails_ends_its_request_and_the_server_goes_on() -> None:
    target = Table()

    def fail() -> None:
        target.before = lambda: None
        raise MemoryError("no memory")

    with running(table_engine(target)) as server:
        target.before = fail
        answer = complete(server)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "step_failed")
        assert complete(server).status_code == 200


def test_ready_tells_loading_from_ready_and_failed_loading_ends_the_server() -> None:
    gate = threading.Event()

    def load() -> Any:
        assert gate.wait(LIMIT)
        return table_engine()

    with running(load) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        ready = httpx.get(f"{server.url}/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "loading"})
        refused = complete(server)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
        gate.set()
        wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 200)
        assert complete(server).status_code == 200

    def broken() -> Any:
        raise ValueError("no weights")

    with running(broken) as server:
        server._thread.join(LIMIT)
        assert isinstance(server.app.state.service.error, ValueError)


def test_draining_refuses_new_requests_and_loses_no_accepted_one() -> None:
    target, gate = gated()
    with running(table_engine(target, max_batch=1)) as server:
        accepted = [Thread(lambda: complete(server)) for _ in range(3)]
        wait_for(lambda: server.status[:2] == (1, 2))
        server.server.handle_exit(15, None)
        ready = httpx.get(f"{server.url}/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        refused = complete(server)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        target.before = lambda: None
        gate.open()
        assert [each.result().status_code for each in accepted] == [200] * 3
        server._thread.join(LIMIT)
        assert not server._thread.is_alive()


def test_a_step_that_hangs_fails_its_requests_by_name() -> None:
    target, gate = gated()
    stopped = threading.Event()
    with running(table_engine(target, max_batch=1), step_seconds=0.4) as server:
        service = server.app.state.service
        service.on_failure = stopped.set  # Not the server's own, which ends this process.
        hanging = [Thread(lambda: complete(server)) for _ in range(2)]
        for each in hanging:
            answer = each.result()
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "step_hung")
        assert stopped.is_set()
        ready = httpx.get(f"{server.url}/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "failed"})
        assert httpx.get(f"{server.url}/health").status_code == 503
        target.before = lambda: None
        gate.open(10)


HANG = """
import threading
from mcsd.server import ListenOptions, create_app, serve
from support.server import Table, table_engine
target = Table()
target.before = lambda: threading.Event().wait()
serve(create_app(table_engine(target), step_seconds=0.5), ListenOptions(port=0), lambda url: print(url, flush=True))
"""


@pytest.mark.thorough
def test_a_process_whose_step_hangs_exits_with_1_after_its_last_answers() -> None:
    command = [sys.executable, "-c", HANG]
    tests = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin"}
    with subprocess.Popen(command, env=tests, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=LIMIT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "step_hung")
        assert process.wait(LIMIT) == 1


def test_logs_are_json_with_the_request_id_and_without_texts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mcsd.server")
    with running(table_engine()) as server:
        answer = httpx.post(
            f"{server.url}/v1/completions", json={"prompt": "topsecret"}, headers={"X-Request-ID": "mine-1"}
        )
        assert answer.headers["x-request-id"] == "mine-1"
        odd = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, headers={"X-Request-ID": "a b" * 99})
        assert odd.headers["x-request-id"].startswith("req_")
    lines = [vars(record)["fields"] for record in caplog.records if record.message == "request"]
    assert lines[0]["id"] == "mine-1"
    assert lines[0]["completion_tokens"] == answer.json()["usage"]["completion_tokens"]
    assert "topsecret" not in str([vars(record) for record in caplog.records])


@pytest.mark.parametrize(("host", "key", "allowed"), [
    ("127.0.0.1", None, True), ("::1", None, True), ("localhost", None, True), ("127.9.9.9", None, True),
    ("0.0.0.0", None, False), ("192.168.0.2", None, False), ("::", None, False), ("example.org", None, False),
    ("0.0.0.0", "secret", True),
])  # fmt: skip
def test_other_machines_need_a_key(host: str, key: str | None, allowed: bool) -> None:
    given = ServerOptions(api_key=key), ListenOptions(host=host)
    if allowed:
        check_exposure(*given)
    else:
        with pytest.raises(InvalidOption, match="without a key"):
            check_exposure(*given)


def test_a_configuration_file_sets_what_has_no_flag(tmp_path: Path) -> None:
    file = tmp_path / "mcsd.toml"
    file.write_text("max_body_bytes = 4096\nheader_seconds = 2.5\n")
    assert read_config(file) == {"max_body_bytes": 4096, "header_seconds": 2.5}
    for text, error in (("port = 1", "option of the command line"), ("x = 1", "not an option"), ("x", "not a TOML")):
        file.write_text(text)
        with pytest.raises(InvalidOption, match=error):
            read_config(file)


def test_a_slow_reader_is_disconnected_and_its_sequence_freed() -> None:
    with running(table_engine(max_length=1 << 17), {"write_seconds": 0.5}) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(server.address)
        fields = {"max_tokens": 100_000, "ignore_eos": True, "logprobs": 20, "stream": True}
        body = json.dumps({"prompt": "x"} | fields).encode()
        connection.sendall(post("/v1/completions", body))
        wait_for(lambda: server.status.running == 1)
        server.idle()
        assert len(server.server.server_state.connections) == 0
        connection.close()


def test_keep_alive_serves_several_requests_on_one_connection() -> None:
    with running(table_engine()) as server:
        connection = http.client.HTTPConnection(*server.address, timeout=LIMIT)
        for _ in range(3):
            connection.request("POST", "/v1/completions", b'{"prompt": "x"}', {"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 200
            answer.read()
        connection.close()
