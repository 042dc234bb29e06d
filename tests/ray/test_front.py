"""A front whose replicas end at every moment of an answer. No process of Ray runs: their handle is played."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import pytest

pytest.importorskip("ray.serve", reason="the extra mcsd[ray] is not installed")

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from mcsd.errors import ReplicaLost
from mcsd.ray import routing
from mcsd.ray.front import FORWARDED, TRIES, Call, Front
from mcsd.ray.front_metrics import merged
from mcsd.server.app import create_routes
from mcsd.server.options import ServerOptions
from mcsd.server.service import Service
from support.server import table_engine

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
FIRST = {"type": "http.response.body", "body": b'data: {"a": 1}\n\n', "more_body": True}
LAST = {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False}
EVENTS = 'data: {"a": 1}\n\ndata: [DONE]\n\n'


class Parts:
    """What one replica answers: parts, in the end perhaps an error."""

    def __init__(self, *parts: Any) -> None:
        self._parts = self._play(parts)
        self.is_cancelled = False

    async def _play(self, parts: Any) -> AsyncIterator[Any]:
        for part in parts:
            if isinstance(part, Exception):
                raise part
            yield part

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._parts

    def __anext__(self) -> Any:
        return self._parts.__anext__()

    def cancel(self) -> None:
        self.is_cancelled = True


class Replicas:
    """A handle of replicas, each of which answers one request."""

    app_name = "played"

    def __init__(self, *answers: Parts) -> None:
        self._answers = list(answers)
        self.avoided: list[list[str]] = []
        self.calls: list[Call] = []
        self.answer = SimpleNamespace(remote=self._answer)

    def options(self, stream: bool) -> "Replicas":
        assert stream
        return self

    def _answer(self, call: Call, beginning: str, avoid: list[str]) -> Parts:
        self.calls.append(call)
        self.avoided.append(list(avoid))
        return self._answers.pop(0)


def ask(replicas: Replicas, request: Callable[[httpx.AsyncClient], Any] | None = None, **options: Any) -> Any:
    """The answer of a front to a request, and the front."""

    async def run() -> Any:
        front = Front(lambda: replicas, ServerOptions.of(options))
        app = front.application()
        async with app.router.lifespan_context(app):
            while front._handle is None:
                await asyncio.sleep(0)
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                send = request or (lambda client: client.post("/v1/completions", json={"prompt": "x"}))
                return await send(client), front

    return asyncio.run(run())


@pytest.mark.parametrize(
    "lost",
    [
        Parts(RayActorError()),
        Parts("a", RayActorError()),
        Parts("a", [START], RayActorError()),
        Parts("a", ReplicaLost("the engine of replica a has failed")),
    ],
    ids=["before it takes the request", "before its status", "after its status", "its engine has failed"],
)
def test_a_request_without_an_answer_goes_to_another_replica(lost: Parts) -> None:
    replicas = Replicas(lost, Parts("b", [START, FIRST, LAST], {"tokens": 1}))
    answer, front = ask(replicas)
    assert (answer.status_code, answer.text) == (200, EVENTS)
    assert lost.is_cancelled
    assert replicas.avoided[0] == []
    assert replicas.avoided[1] in ([""], ["a"])
    assert b'mcsd:replica_losses_total{begun="false",front=""} 1.0' in front.metrics.text()
    assert not front.is_busy


def test_a_stream_that_has_begun_ends_with_a_named_error() -> None:
    answer, front = ask(Replicas(Parts("a", [START, FIRST], RayActorError())))
    assert answer.status_code == 200
    first, last, rest = answer.text.split("\n\n")
    assert (first, rest) == ('data: {"a": 1}', "")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("replica_lost", "server_error")
    assert b'mcsd:replica_losses_total{begun="true",front=""} 1.0' in front.metrics.text()


def test_a_whole_answer_stays_whole_when_its_replica_ends_afterwards() -> None:
    answer, front = ask(Replicas(Parts("a", [START, FIRST, LAST], RayActorError())))
    assert answer.text == EVENTS
    assert b"replica_losses_total{" not in front.metrics.text()


def test_a_request_that_ends_its_readers_is_given_up() -> None:
    replicas = Replicas(*(Parts(str(number), RayActorError()) for number in range(TRIES)))
    answer, _ = ask(replicas)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")
    assert answer.headers["retry-after"]
    assert replicas.avoided[-1] == ["0", "1"]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (BackPressureError(1, 1), 429, "rate_limit_exceeded"),
        (RuntimeError("a fault"), 500, "internal_error"),
        (TimeoutError(), 503, "request_timed_out"),
    ],
)
def test_other_failures_have_an_answer(error: Exception, status: int, code: str) -> None:
    answer, _ = ask(Replicas(Parts(error)))
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert "a fault" not in answer.text


def test_what_the_gateway_refuses_reaches_no_replica() -> None:
    def bad(client: httpx.AsyncClient) -> Any:
        return client.post("/v1/completions", content=b"x" * 2000, headers={"Authorization": "Bearer k"})

    replicas = Replicas()
    assert ask(replicas, api_key="k")[0].status_code == 401
    assert ask(replicas, bad, api_key="k", max_body_bytes=1024)[0].status_code == 413
    assert ask(replicas, lambda client: client.get("/health", headers={"Host": "evil.example"}))[0].status_code == 400
    assert not replicas.calls


def test_the_key_stays_in_the_front() -> None:
    def keyed(client: httpx.AsyncClient) -> Any:
        return client.post("/v1/completions", json={"prompt": "x"}, headers={"Authorization": "Bearer secret-key"})

    replicas = Replicas(Parts("a", [START, FIRST, LAST]))
    assert ask(replicas, keyed, api_key="secret-key")[0].status_code == 200
    assert "secret-key" not in repr(replicas.calls)


def test_a_client_that_goes_away_cancels_the_answer() -> None:
    class Endless(Parts):
        async def _play(self, parts: Any) -> AsyncIterator[Any]:
            yield "a"
            yield [START, FIRST]
            await asyncio.Future()

    async def run() -> None:
        parts = Endless()
        front = Front(lambda: Replicas(parts), ServerOptions())
        app, sent = front.application(), []
        gone = asyncio.Event()
        whole = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive() -> Any:
            if whole:
                return whole.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            gone.set()

        async with app.router.lifespan_context(app):
            while front._handle is None:
                await asyncio.sleep(0)
            headers = [(b"host", b"localhost"), (b"content-length", b"2")]
            scope = Call("POST", "/v1/completions", b"", b"", b"").scope() | {"headers": headers, "state": {}}
            async with asyncio.timeout(5):
                await app(scope, receive, send)
        assert parts.is_cancelled
        assert not front.is_busy
        assert len(sent) == 2

    asyncio.run(run())


def test_the_front_knows_all_routes_of_a_replica() -> None:
    engine = table_engine()
    routes = create_routes(Service(engine, ServerOptions(playground=True))).routes
    paths = {str(getattr(route, "path", "")) for route in routes}
    front = Front(lambda: None, ServerOptions())
    assert paths == FORWARDED | set(front._own)


def test_requests_of_a_conversation_have_the_same_beginning() -> None:
    def beginning(**body: Any) -> str:
        return Call("POST", "/", b"", b"", json.dumps(body).encode()).beginning()

    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    more = [*talk, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "and?"}]
    assert beginning(messages=talk) == beginning(messages=more) != ""
    assert beginning(messages=talk) != beginning(messages=[*talk[:1], {"role": "user", "content": "other"}])
    assert beginning(input="x", instructions="a") != beginning(input="x", instructions="b")
    assert beginning(prompt=[1, 2]) != beginning(prompt=[1, 3])
    assert beginning(prompt="x" * 2000) == beginning(prompt="x" * 3000)
    for body in (b"", b"[" * 100_000, b"1", b'{"messages": 5}', b'{"messages": [1]}', b"\xff"):
        assert isinstance(Call("POST", "/", b"", b"", body).beginning(), str)


def test_routing_keeps_beginnings_together_and_loads_bounded() -> None:
    names = [f"replica-{number}" for number in range(20)]
    beginnings = [f"conversation {number}" for number in range(2000)]
    idle = [0] * len(names)
    first = [routing.choose(beginning, names, idle) for beginning in beginnings]
    assert first == [routing.choose(beginning, names, idle) for beginning in beginnings]
    counts = [first.count(index) for index in range(len(names))]
    assert 50 < min(counts) <= max(counts) < 160
    fewer = names[:-1]
    moved = [a != routing.choose(beginning, fewer, idle[:-1]) for a, beginning in zip(first, beginnings, strict=True)]
    assert sum(moved) == counts[-1]  # Only those of the replica that has ended.
    running = list(idle)
    for _ in range(400):
        running[routing.choose("the same for all", names, running)] += 1
    assert max(running) <= 26  # 1.25 of the mean, rounded up.
    assert routing.choose("", names, [1] * 7 + [0] + [1] * 12) == 7


def test_metrics_of_several_processes_are_one_text() -> None:
    one = b'# HELP a A.\n# TYPE a counter\na{engine="1"} 1.0\n# HELP b B.\n# TYPE b gauge\nb 2.0\n'
    two = b'# HELP a A.\n# TYPE a counter\na{engine="2"} 3.0\n'
    assert merged([one, two]) == (
        b'# HELP a A.\n# TYPE a counter\na{engine="1"} 1.0\na{engine="2"} 3.0\n# HELP b B.\n# TYPE b gauge\nb 2.0\n'
    )
