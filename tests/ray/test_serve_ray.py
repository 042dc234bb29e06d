"""``mcsd serve --ray 2`` on real weights: one replica is killed under 200 streams; and SIGTERM."""

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

pytest.importorskip("ray.serve", reason="the extra mcsd[ray] is not installed")

import mcsd
from mcsd.cli import main
from support.load import Refused, answer, client_of, job
from support.ray_cluster import metric, replica_processes, replicas_of, wait_until
from support.threads import LIMIT

pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("ignore")]  # Those of Ray.

ENGINE = ["--target", "smollm2-135m", "--dtype", "float32", "--tree", "2x1"]
TOKENS = 12
REQUESTS = 200
TOPICS = ("the sea", "a proof", "an old clock", "bread", "the moon", "a letter")


class Command:
    """The command on a free port."""

    def __init__(self) -> None:
        words = [sys.executable, "-m", "mcsd", "serve", *ENGINE, "--ray", "2", "--port", "0", "--max-waiting", "256"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        wait_until(lambda: self.url is not None, 2 * LIMIT)

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)

    @property
    def url(self) -> Any:
        found = re.search(r"(http://\S+)/v1", "".join(self.lines))
        return found and found[1]


@pytest.fixture(scope="module")
def server() -> Iterator[Command]:
    command = Command()
    try:
        wait_until(lambda: replicas_of(command.url) == 2, 4 * LIMIT)
        yield command
    finally:
        command.process.kill()
        command.process.wait()


def test_a_killed_replica_harms_only_its_streams(server: Command, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(3)
    jobs = [
        job(f"Tell of {chance.choice(TOPICS)} {seed}:", seed % 2 == 0, seed=seed, max_new_tokens=TOKENS, stream=True)
        for seed in range(REQUESTS)
    ]
    results: list[Any] = [None] * REQUESTS
    left = iter(enumerate(jobs))
    killed = 0.0
    root = psutil.Process(server.process.pid)

    async def work(client: Any) -> None:
        for index, each in left:
            try:
                results[index] = await answer(client, each.path, each.body)
            except Refused as error:
                results[index] = error

    async def load() -> None:
        nonlocal killed
        async with client_of(server.url, 4 * LIMIT) as client, asyncio.TaskGroup() as group:
            for _ in range(24):
                group.create_task(work(client))
            while sum(result is not None for result in results) < REQUESTS // 4:
                await asyncio.sleep(0.05)
            chance.choice(replica_processes(root)).kill()
            killed = time.monotonic()
            while replicas_of(server.url) == 2:
                await asyncio.sleep(0.1)
            while replicas_of(server.url) < 2:
                await asyncio.sleep(0.5)
            with capsys.disabled():
                print(f"\nback to two replicas after {time.monotonic() - killed:.1f} s, under load")

    asyncio.run(load())
    assert replicas_of(server.url) == 2
    lost = [each for each in results if isinstance(each, Refused)]
    assert all((each.status, each.code) == (200, "replica_lost") for each in lost)
    assert 0 < len(lost) <= 12
    moved = [count for labels, count in metric(server.url, "mcsd:replica_losses_total").items() if "false" in labels]
    with capsys.disabled():
        print(f"{len(lost)} of {REQUESTS} streams had begun on the killed replica; {sum(moved):.0f} requests moved")
    engine = mcsd.Engine.load("smollm2-135m", dtype="float32", tree="2x1", max_batch=8)
    kept = [(each, result) for each, result in zip(jobs, results, strict=True) if not isinstance(result, Refused)]
    prompts = [engine.chat_tokens(each.prompt) if isinstance(each.prompt, list) else each.prompt for each, _ in kept]
    alone: Any = engine.generate(prompts, [each.fields for each, _ in kept])
    assert [result[0][0] for _, result in kept] == [done.token_ids for done in alone]


def test_sigterm_ends_accepted_requests_and_all_processes(server: Command) -> None:
    """The last test of the module: it ends the server."""
    wait_until(lambda: len(replica_processes(psutil.Process(server.process.pid))) == 2, LIMIT)
    below = psutil.Process(server.process.pid).children(recursive=True)
    each = job("Once", seed=1, max_new_tokens=60, ignore_eos=True, stream=True)

    async def load() -> Any:
        async with client_of(server.url, 2 * LIMIT) as client:
            text = asyncio.create_task(answer(client, each.path, each.body))
            await asyncio.sleep(0.5)
            server.process.send_signal(signal.SIGTERM)
            return await text

    ((ids, _, reason),) = asyncio.run(load())
    assert (len(ids), reason) == (60, "length")
    assert server.process.wait(LIMIT) == 0
    _, alive = psutil.wait_procs(below, LIMIT)
    assert not alive
    assert not any("Traceback" in line for line in server.lines), server.lines


def test_too_many_replicas_for_this_machine_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--ray", "2", "--ray-cpus", "4096"]) == 2
    assert "do not fit on" in capsys.readouterr().err
