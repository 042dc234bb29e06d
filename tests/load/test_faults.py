"""Faults of every kind in random order, under load: each has its name, and all other requests have their texts."""

import asyncio
import json
import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx2 as httpx
import pytest

from mcsd import AsyncEngine, SamplingParams, errors
from mcsd.server import create_app
from mcsd.server.logs import JsonFormatter
from support import faults
from support.load import Job, Refused, Text, answer, client_of, job, mixed_jobs
from support.server import Running, Table, post, running, table_engine
from support.threads import LIMIT

TIMES = int(os.environ.get("MCSD_FAULTS", "2"))
"""How often each kind of fault is met."""

BYSTANDERS, FAULTS_AT_A_TIME, BATCH, WAITING = 5, 4, 8, 16
PROMPTS = ("once upon", "a b c", "hello " * 20)
LONG = job("long", max_new_tokens=250, seed=5, ignore_eos=True)
CROWD = job("crowd", max_new_tokens=40, seed=6, ignore_eos=True, n=16)


async def unless_full(send: Callable[[], Awaitable[Any]]) -> Any:
    """The answer to a request, which is sent again where the queue is full."""
    while True:
        try:
            return await send()
        except Refused as error:
            if (error.status, error.retry) != (429, "1"):
                raise
        except errors.EngineBusy:
            pass
        await asyncio.sleep(0.02)


@dataclass
class World:
    """What the faults happen to.

    Attributes:
        server, client: under load.
        hurried: client of another server with the same engine, where requests have little time.
        engine: of both.
        random: for the details of faults.
        expected: texts that some jobs have alone.
    """

    server: Running
    client: httpx.AsyncClient
    hurried: httpx.AsyncClient
    engine: AsyncEngine
    random: Random
    expected: dict[str, list[Text]]

    async def answer(self, each: Job, **options: Any) -> list[Text]:
        """The answer to a job; where the queue is full it is sent again."""
        found: list[Text] = await unless_full(lambda: answer(self.client, each.path, each.body, **options))
        return found

    async def fails(self, each: Job, status: int, code: str) -> None:
        with pytest.raises(Refused) as info:
            await self.answer(each)
        assert (info.value.status, info.value.code) in [(status, code), (200, code)]

    def marked(self, mark: str, **fields: Any) -> Job:
        """A job that meets a token at once or later."""
        prompt = self.random.choice([f"some {mark} text", f"text {mark}", f"text {faults.FUSES[mark][0]}"])
        return self.job(prompt, **fields)

    def job(self, prompt: str, **fields: Any) -> Job:
        stream, seed = self.random.random() < 0.5, self.random.getrandbits(60)
        return job(prompt, max_new_tokens=50, seed=seed, stream=stream, **fields)


async def target_raises(world: World) -> None:
    await world.fails(world.marked(faults.TARGET), 500, "step_failed")


async def allocation_fails(world: World) -> None:
    await world.fails(world.marked(faults.MEMORY), 500, "step_failed")


async def draft_raises(world: World) -> None:
    await world.fails(world.marked(faults.DRAFT), 500, "step_failed")


async def scheme_raises(world: World) -> None:
    await world.fails(world.job("text", top_k=faults.SCHEME_TOP_K), 500, "step_failed")


async def grammar_fails(world: World) -> None:
    await world.fails(world.job("text", grammar=faults.EXPLODING_GRAMMAR), 400, "grammar_failed")


async def logits_are_nan(world: World) -> None:
    prompt = world.random.choice([f"text {faults.NAN}", f"text {faults.FUSES[faults.NAN][0]}"])
    await world.fails(world.job(prompt), 500, "non_finite_logits")


async def detokenizer_raises(world: World) -> None:
    await world.fails(world.job(f"text {faults.FUSES[faults.DECODE][0]}"), 500, "step_failed")


async def tokenizer_raises(world: World) -> None:
    await world.fails(world.job(f"text {faults.ENCODE}"), 500, "internal_error")


async def processor_raises(world: World) -> None:
    calls = world.random.randint(0, 9)

    def broken(ids: Any, logits: Any) -> Any:
        if ids.shape[1] > 3 + calls:
            raise RuntimeError("broken")
        return logits

    params = SamplingParams(max_new_tokens=50, ignore_eos=True, logits_processors=(broken,))
    with pytest.raises(errors.ProcessorFailed):
        await unless_full(lambda: world.engine.generate("text", params))


async def client_disconnects(world: World) -> None:
    each = world.job("text")
    _, writer = await asyncio.open_connection(*world.server.address)
    body = httpx.Request("POST", world.server.url, json=each.body).content
    sent = post(each.path, body)
    writer.write(sent[: world.random.choice([40, len(sent) - 5, len(sent), len(sent)])])
    await asyncio.sleep(world.random.uniform(0, 0.03))
    writer.transport.abort()


async def client_cancels(world: World) -> None:
    try:
        async with asyncio.timeout(world.random.uniform(0, 0.2)):
            await world.answer(job("text", max_new_tokens=3000, stream=True))
    except TimeoutError:
        return
    raise AssertionError("3000 tokens in so short a time")


async def client_is_slow(world: World) -> None:
    streamed = Job(LONG.path, LONG.body | {"stream": True}, LONG.prompt, LONG.fields)
    assert await world.answer(streamed, pause=0.2) == world.expected["long"]


async def request_times_out(world: World) -> None:
    each = job("text", max_new_tokens=4000, ignore_eos=True, stream=world.random.random() < 0.5)
    with pytest.raises(Refused) as info:
        await unless_full(lambda: answer(world.hurried, each.path, each.body))
    assert info.value.code == "request_timed_out"


async def queue_is_full(world: World) -> None:
    sent = [answer(world.client, CROWD.path, CROWD.body) for _ in range(4)]
    for found in await asyncio.gather(*sent, return_exceptions=True):
        if isinstance(found, Refused):
            assert (found.status, found.code, found.retry) == (429, "rate_limit_exceeded", "1")
        else:
            assert found == world.expected["crowd"]


async def server_terminates(world: World) -> None:
    """SIGTERM to a server with an engine of its own, while it is busy."""
    target, go = Table(), threading.Event()
    target.before = go.wait
    server = await asyncio.to_thread(lambda: Running(create_app(table_engine(target))))
    async with client_of(server.url) as client:
        accepted = [asyncio.create_task(answer(client, LONG.path, LONG.body)) for _ in range(3)]
        while server.status.running < 3:
            await asyncio.sleep(0.001)
        go.set()
        server.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises((Refused, httpx.TransportError)) as info:
            await answer(client, LONG.path, LONG.body)
        assert not isinstance(info.value, Refused) or (info.value.status, info.value.code) == (503, "draining")
        assert await asyncio.gather(*accepted) == [world.expected["other engine"]] * 3
    await asyncio.to_thread(server._thread.join, LIMIT)
    assert not server._thread.is_alive()


FAULTS: list[Callable[[World], Awaitable[None]]] = [
    *(target_raises, allocation_fails, draft_raises, scheme_raises, grammar_fails, logits_are_nan, detokenizer_raises),
    *(tokenizer_raises, processor_raises, client_disconnects, client_cancels, client_is_slow, request_times_out),
    *(queue_is_full, server_terminates),
]


@pytest.mark.slow
def test_faults_in_random_order() -> None:
    engine = faults.faulty_engine(BATCH)
    jobs = mixed_jobs(60, seed=3, prompts=PROMPTS, longest=60)
    expected = [each.alone(engine) for each in jobs]
    alone = {"long": LONG.alone(engine), "crowd": CROWD.alone(engine), "other engine": LONG.alone(table_engine())}
    random, order = Random(4), FAULTS * TIMES
    random.shuffle(order)
    served = AsyncEngine(engine, max_waiting=WAITING)
    answers = [0] * BYSTANDERS

    async def main(server: Running, hurried: Running) -> None:
        async with client_of(server.url) as client, client_of(hurried.url) as other:
            world = World(server, client, other, served, random, alone)
            left = iter(order)

            async def meet() -> None:
                for fault in left:
                    async with asyncio.timeout(LIMIT):
                        await fault(world)

            async def stand_by(number: int) -> None:
                shift = 12 * number
                while True:
                    for each, texts in zip(
                        jobs[shift:] + jobs[:shift], expected[shift:] + expected[:shift], strict=True
                    ):
                        assert await world.answer(each) == texts, each
                        answers[number] += 1

            bystanders = [asyncio.create_task(stand_by(number)) for number in range(BYSTANDERS)]
            meeting = asyncio.gather(*(meet() for _ in range(FAULTS_AT_A_TIME)))
            await asyncio.wait([meeting, *bystanders], return_when=asyncio.FIRST_COMPLETED)
            for task in bystanders:
                assert not task.done(), task.exception()
            await meeting
            for task in bystanders:
                task.cancel()
            await asyncio.gather(*bystanders, return_exceptions=True)

    hurry = {"max_wait_seconds": 0.05, "max_run_seconds": 0.05}
    with running(served) as server, running(served, **hurry) as hurried:
        asyncio.run(main(server, hurried))
        server.idle()
    print(f"{len(order)} faults, {sum(answers)} answers beside them")
    assert all(answers)
    assert not engine._waiting
    caches = [engine.cache, engine.drafter.cache]  # type: ignore[attr-defined]
    assert [(cache.batch_size, sum(cache.host_lengths)) for cache in caches] == [(0, 0)] * 2
    assert served.status == (0, 0, served.status.error, False)


def test_the_log_has_the_place_of_an_error_and_no_text(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mcsd.server"), "propagate", True)

    async def main(server: Running) -> None:
        async with client_of(server.url) as client:
            each = job(f"secret {faults.TARGET}", max_new_tokens=5)
            with pytest.raises(Refused):
                await answer(client, each.path, each.body)

    with running(faults.faulty_engine(1)) as server:
        asyncio.run(main(server))
    (record,) = [record for record in caplog.records if record.message == "step failed"]
    line = json.loads(JsonFormatter().format(record))
    assert line["error"] == "RuntimeError"
    assert line["lines"][-1].startswith("faults.py:")
    assert "secret" not in caplog.text
