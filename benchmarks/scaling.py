"""What replicas by Ray Serve cost: the way through a front, a replica's return, and what grows with their number.

    python benchmarks/scaling.py --target smollm2-135m [--replicas 1000]

Starts ``mcsd serve``, ``mcsd serve --ray 1``, the same application behind Ray's proxy, and ``mcsd serve --ray 2``, one
after the other. Prints the time to the first text of short requests, one at a time; how long after SIGKILL a second
replica takes requests again; and for many replicas the time to choose one, and the time and size of ``/metrics``.
"""

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import psutil

BODY = {"prompt": "Once upon a time", "max_tokens": 1, "temperature": 0, "stream": True}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--replicas", type=int, default=1000)
    args = parser.parse_args()
    engine = ["-m", args.target, "--tree", "2x2"]
    for name, words in (("mcsd serve", []), ("mcsd serve --ray 1", ["--ray", "1"])):
        with served([*engine, *words]) as (url, process, started):
            print_times(name, url, args.requests, started)
            if words:
                request, chunk = front_seconds(url, process)
                print(f"the front takes {request * 1e3:.2f} ms of a core a request, {chunk * 1e3:.2f} ms a chunk")
                text = httpx.get(f"{url}/metrics").content
    with behind_ray(args.target) as (url, started):
        print_times("deployment(), Ray's proxy", url, args.requests, started)
    with served([*engine, "--ray", "2"], replicas=2) as (url, process, started):
        print(f"two replicas: ready after {started:.1f} s; a killed one is back after {back(url, process):.1f} s")
    print(f"{args.replicas} replicas: a choice takes {choice_seconds(args.replicas) * 1e3:.2f} ms")
    size, seconds = metrics_cost(text, args.replicas)
    print(f"/metrics: {len(text) / 1e3:.1f} kB a replica, {size / 1e6:.1f} MB merged in {seconds * 1e3:.0f} ms")


@contextmanager
def served(words: list[str], replicas: int = 1) -> Iterator[tuple[str, psutil.Process, float]]:
    """Run ``mcsd serve`` on a free port. Yields its address, its process, and the seconds until it was ready."""
    began = time.monotonic()
    command = [sys.executable, "-m", "mcsd", "serve", *words, "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stderr is not None
        try:
            url = next(found[1] for line in server.stderr if (found := re.search(r"(http://\S+)/v1", line)))
            threading.Thread(target=server.stderr.read, daemon=True).start()
            wait(url, replicas)
            yield url, psutil.Process(server.pid), time.monotonic() - began
        finally:
            server.terminate()
            server.wait()


@contextmanager
def behind_ray(target: str) -> Iterator[tuple[str, float]]:
    """One replica behind Ray's proxy."""
    import ray
    from ray import serve

    import mcsd.ray

    began = time.monotonic()
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
    try:
        serve.start(http_options={"port": 18123}, logging_config={"log_level": "ERROR"})
        serve.run(mcsd.ray.deployment(target, tree="2x2"))
        wait("http://127.0.0.1:18123", 1)
        yield "http://127.0.0.1:18123", time.monotonic() - began
    finally:
        serve.shutdown()
        ray.shutdown()


def wait(url: str, replicas: int) -> None:
    """Wait until a server is ready, or its front knows so many replicas."""
    while ready(url) < replicas:
        time.sleep(0.1)


def ready(url: str) -> int:
    """The replicas of a front; 1 for a server without a front."""
    answer = httpx.get(f"{url}/ready")
    return int(answer.json().get("replicas", 1)) if answer.status_code == 200 else 0


def print_times(name: str, url: str, requests: int, started: float) -> None:
    """Print the times of requests, one after the other."""
    first: list[float] = []
    with httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(requests + 10):
            began = time.monotonic()
            with client.stream("POST", "/v1/completions", json=BODY) as answer:
                events = (line for line in answer.iter_lines() if line.startswith("data: {"))
                next(events)
                first.append(time.monotonic() - began)
                assert not list(events)[1:]
    first = sorted(first[10:])
    median, slow = statistics.median(first), first[int(0.99 * len(first))]
    print(f"{name}: first text after {median * 1e3:.1f} ms (99 %: {slow * 1e3:.1f}); ready after {started:.1f} s")


def front_seconds(url: str, process: psutil.Process) -> tuple[float, float]:
    """Processor time of the front for a request with one chunk, and for each chunk more."""

    def busy(tokens: int, requests: int) -> tuple[float, int]:
        chunks, before = 0, sum(process.cpu_times()[:2])
        for _ in range(requests):
            body = BODY | {"max_tokens": tokens, "ignore_eos": True, "speculative": {"enabled": False}}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
                chunks += sum(line.startswith("data: {") for line in answer.iter_lines())
        return sum(process.cpu_times()[:2]) - before, chunks

    short, long = busy(1, 100), busy(200, 5)
    request = short[0] / short[1]
    return request, (long[0] - 5 * request) / (long[1] - 5)


def back(url: str, process: psutil.Process) -> float:
    """Seconds from killing one of two replicas until there are two again."""
    engines = [each for each in process.children(recursive=True) if "ServeReplica" in " ".join(each.cmdline())]
    engines[0].kill()
    began = time.monotonic()
    while ready(url) == 2:
        time.sleep(0.05)
    wait(url, 2)
    return time.monotonic() - began


def choice_seconds(count: int) -> float:
    """Seconds to choose one of many replicas, with requests on all of them."""
    from mcsd.ray.router import PrefixRouter

    replicas: Any = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=f"replica{n}")) for n in range(count)]
    router: Any = SimpleNamespace(replica_queue_len_cache=SimpleNamespace(get=lambda replica: 4))

    async def choose() -> float:
        times = []
        for number in range(200):
            pending: Any = SimpleNamespace(
                kwargs={"beginning": f"{number}" * 300, "avoid": []}, routing_context=SimpleNamespace()
            )
            began = time.perf_counter()
            await PrefixRouter.choose_replicas(router, replicas, pending)
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    return asyncio.run(choose())


def metrics_cost(text: bytes, count: int) -> tuple[int, float]:
    """The bytes of the merged metrics of many replicas, and the seconds to merge them."""
    from mcsd.ray.front_metrics import merged

    texts = [text.replace(b'engine="', b'engine="%d-' % number) for number in range(count)]
    began = time.perf_counter()
    whole = merged(texts)
    return len(whole), time.perf_counter() - began


if __name__ == "__main__":
    main()
