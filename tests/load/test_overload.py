"""Ten times as many requests as the engine can take: refused at once, and the engine works as before afterwards.

On a machine that other tests share, half of the refusals must come within 100 ms, on an idle one 99 %. A rate is in
answers a unit of a clock: of the wall clock, or of one that counts forwards and so is no slower on a busy machine."""

import asyncio
import time
from collections.abc import Callable
from random import Random
from statistics import quantiles
from typing import Any

import httpx2 as httpx
import pytest

import mcsd
from support.load import Refused, answer, client_of, job
from support.memory import resident
from support.server import Running, Table, running, table_engine
from support.threads import LIMIT

Clock = Callable[[], float]


async def rate(client: httpx.AsyncClient, body: dict[str, Any], clients: int, seconds: float, clock: Clock) -> float:
    """Answers a second that some clients get, each of whom asks again after an answer."""
    began, count = clock(), 0

    async def work() -> None:
        nonlocal count
        while clock() < began + seconds:
            await answer(client, "/v1/completions", body)
            count += 1

    await asyncio.gather(*(work() for _ in range(clients)))
    return count / (clock() - began)


async def overload(
    client: httpx.AsyncClient, body: dict[str, Any], a_second: float, seconds: float
) -> tuple[list[float], int]:
    """Send requests at random moments. Returns the seconds until each refusal, and how many were answered."""
    random, answered = Random(1), 0
    refusals: list[float] = []
    errors = set()

    async def send() -> None:
        nonlocal answered
        began = time.monotonic()
        try:
            await answer(client, "/v1/completions", body)
            answered += 1
        except Refused as error:
            refusals.append(time.monotonic() - began)
            errors.add((error.status, error.code, error.retry))

    begin = time.monotonic()
    moment = begin
    async with asyncio.TaskGroup() as group:
        while moment < begin + seconds:
            moment += random.expovariate(a_second)
            await asyncio.sleep(moment - time.monotonic())
            group.create_task(send())
    assert errors == {(429, "rate_limit_exceeded", "1")}
    return refusals, answered


def check_overload(server: Running, body: dict[str, Any], seconds: float, clock: Clock, percent: int) -> None:
    times = 10.0
    places = server.engine.max_batch
    memory: list[int] = []

    async def main() -> None:
        async with client_of(server.url, 4 * LIMIT) as client:
            before = await rate(client, body, places, seconds, clock)
            memory.append(resident("VmRSS"))
            began = clock()
            refusals, answered = await overload(client, body, times * before, seconds)
            expected = before * (clock() - began)
            memory.append(resident("VmRSS"))
            # All that was accepted has been answered.
            after = await rate(client, body, places, min(seconds, 5.0), clock)
            slow = quantiles(refusals, n=100)[percent - 1]
            print(
                f"{before:.1f} answers/s before, {after:.1f} after; {len(refusals)} refused ({percent} % within"
                f" {1000 * slow:.0f} ms), {answered} answered; memory {memory[0] / 1e6:.0f} to"
                f" {memory[1] / 1e6:.0f} MB"
            )
            # It has gone on with what it took.
            assert answered > 0.7 * expected
            assert len(refusals) > 0.7 * (times - 2) * before * seconds
            assert slow < 0.1
            assert after > 0.9 * before

    asyncio.run(main())
    assert memory[1] < 1.02 * memory[0]
    server.idle()


def test_a_slow_table() -> None:
    target, seconds, forwards = Table(), 0.02, 0

    def before() -> None:
        nonlocal forwards
        forwards += 1
        time.sleep(seconds)

    target.before = before
    engine = table_engine(target, tree="none", max_batch=2)
    body = job("a", max_new_tokens=10, seed=1, ignore_eos=True).body
    with running(engine, max_waiting=2) as server:
        check_overload(server, body, seconds=1.5, clock=lambda: seconds * forwards, percent=50)


@pytest.mark.slow
def test_smollm2() -> None:
    engine = mcsd.Engine.load("smollm2-135m", dtype="float32", tree="2x2x1", max_batch=8, max_length=2048)
    body = job("Once upon a time", max_new_tokens=64, seed=1, ignore_eos=True).body
    with running(engine, max_waiting=8) as server:
        check_overload(server, body, seconds=20, clock=time.monotonic, percent=99)
