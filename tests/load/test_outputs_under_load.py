"""Many clients at the same time, some of which go away: every text is the one that its seed has alone."""

import asyncio
import gc
from typing import Any

import pytest

import mcsd
from support.load import Job, client_of, mixed_jobs, run_jobs
from support.memory import resident
from support.server import Running, running, table_engine

PROMPTS = ("Once upon a time", "def add(a, b):\n", "The three most important rules are", "1, 2, 3, 4,", "abc" * 40)


def check_load(server: Running, jobs: list[Job], clients: int) -> list[int]:
    """Send jobs, and compare the texts with those alone. Returns the resident memory after each, in bytes."""
    engine = server.engine
    expected = [None if job.leaves is not None else job.alone(engine) for job in jobs]
    memory: list[int] = []

    async def main() -> list[Any]:
        async with client_of(server.url) as client:
            return await run_jobs(client, jobs, clients, lambda: memory.append(resident("VmRSS")))

    found = asyncio.run(main())
    for job, texts, alone in zip(jobs, found, expected, strict=True):
        assert job.leaves is not None or texts == alone, job
    server.idle()
    assert not engine._waiting
    drafter: Any = engine.drafter
    caches = [engine.cache, getattr(drafter, "drawn", drafter).cache]
    assert [(cache.batch_size, sum(cache.host_lengths)) for cache in caches] == [(0, 0)] * 2
    return memory


def test_a_table() -> None:
    with running(table_engine(max_batch=8)) as server:
        jobs = mixed_jobs(40, seed=1, prompts=PROMPTS, longest=60, cancelled=0.2)
        assert 4 <= sum(job.leaves is not None for job in jobs) <= 12
        check_load(server, jobs, clients=12)


@pytest.mark.slow
def test_smollm2() -> None:
    # As `mcsd serve` runs it: with tree auto the text of a seed does not depend on q. A verification that reads q sees
    # how the draft, whose activations are int8 even here, rounds in batches of another size.
    engine = mcsd.Engine.load("smollm2-135m", dtype="float32", max_batch=8, max_length=2048)
    with running(engine) as server:
        jobs = mixed_jobs(200, seed=2, prompts=PROMPTS, longest=48, cancelled=0.2)
        assert 30 <= sum(job.leaves is not None for job in jobs) <= 50
        memory = check_load(server, jobs, clients=12)
        gc.collect()
        growth = max(memory[-10:]) / memory[49] - 1
        print(f"memory: {memory[49] / 1e6:.0f} MB after 50 requests, growth {growth:.2%}")
        assert growth < 0.01
