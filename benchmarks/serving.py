"""Throughput and latency of ``mcsd serve`` against the bare engine, and against plain decoding of one request.

    python benchmarks/serving.py --target qwen2.5-coder-1.5b --draft qwen2.5-coder-0.5b [--other NAME=URL]

Each round makes the same texts three times: the engine with all prompts at once; clients of the server (one process,
streamed answers, each client asks again when its answer has ended); and the engine without candidates, one prompt after
the other. Other servers of OpenAI's API, which run already, get the same requests in the same rounds. Prints tokens per
second, their ratios (medians of rounds), and what clients see: the time to the first token, and between the chunks of a
text, each of which has the tokens of a step. Clients and servers share the processor: their share of it is printed.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx2 as httpx

import mcsd
from mcsd.prompts import default_prompts

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}
"""Whatever a model's own defaults are."""


@dataclass
class Latencies:
    """What clients have seen, in seconds.

    Attributes:
        first: from a request to its first tokens.
        between: between the chunks of a text.
        shares: of the processor that the clients took, in each round.
    """

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def add(self, times: Sequence[float]) -> None:
        """Take the moments of a request and its chunks."""
        gaps = [after - before for before, after in pairwise(times)]
        self.first.append(gaps[0])
        self.between += gaps[1:]


def main() -> None:
    """Time a pair."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="qwen2.5-coder-1.5b")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b")
    parser.add_argument("--tree", default="auto")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=2, help="of each client in a round")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain", type=int, default=2, help="requests of plain decoding in a round")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=URL")
    args = parser.parse_args()
    others = dict(other.split("=", 1) for other in args.other)
    engine = mcsd.Engine.load(args.target, args.draft, tree=args.tree, max_batch=args.clients)
    plain = mcsd.Engine(engine.target, "ngram", engine.tokenizer, tree="none")
    texts = default_prompts(engine.encoder)
    prompts = [texts[i % len(texts)] for i in range(args.clients * args.requests)]
    names = ["server", *others]
    latencies = {name: Latencies() for name in names}
    rates: dict[str, list[float]] = {name: [] for name in ("engine", "plain", *names)}
    with served(args) as url:
        for number in range(args.rounds + 1):
            rates["engine"].append(engine_rate(engine, prompts, args.tokens))
            for name, address in {"server": url, **others}.items():
                load = server_rate(address, prompts, args.clients, args.tokens, latencies[name])
                rates[name].append(asyncio.run(load))
            rates["plain"].append(
                statistics.mean(engine_rate(plain, [prompt], args.tokens) for prompt in prompts[: args.plain])
            )
            if not number:
                # The first round warms up.
                rates, latencies = {name: [] for name in rates}, {name: Latencies() for name in names}
    report(rates, latencies)


@contextmanager
def served(args: argparse.Namespace) -> Iterator[str]:
    """Run ``mcsd serve`` on a free port. Yields its address."""
    options = ["-m", args.target, "-md", args.draft, "--tree", args.tree, "--max-batch", str(args.clients)]
    command = [sys.executable, "-m", "mcsd", "serve", *options, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            url = next(found[1] for line in server.stderr if (found := re.search(r"(http://\S+)/v1", line)))
            while httpx.get(f"{url}/ready").status_code != 200:
                time.sleep(0.2)
            # Its log, which it would wait to write at some point.
            with subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL):
                yield url
                server.terminate()
        finally:
            server.terminate()


def engine_rate(engine: mcsd.Engine, prompts: Sequence[Any], tokens: int) -> float:
    """Tokens per second of the engine at temperature 1."""
    params = [{**SAMPLING, "seed": seed, "max_new_tokens": tokens} for seed in range(len(prompts))]
    began = time.monotonic()
    done = engine.generate(list(prompts), params)
    return float(sum(each.stats.new_tokens for each in done) / (time.monotonic() - began))


async def server_rate(url: str, prompts: Sequence[Any], clients: int, tokens: int, latencies: Latencies) -> float:
    """Tokens per second that clients of the server get together, in streams."""
    left = iter(enumerate(prompts))
    made = 0

    async def ask(client: httpx.AsyncClient) -> None:
        nonlocal made
        for seed, prompt in left:
            body = {**SAMPLING, "prompt": prompt, "seed": seed, "max_tokens": tokens, "stream": True}
            times, last = [time.monotonic()], ""
            body["stream_options"] = {"include_usage": True}
            async with client.stream("POST", "/v1/completions", json=body) as response:
                assert response.status_code == 200, await response.aread()
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        times.append(time.monotonic())
                        last = line
            # The last one has the usage, and no text.
            latencies.add(times[:-1])
            made += json.loads(last[6:])["usage"]["completion_tokens"]

    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        began, worked = time.monotonic(), time.process_time()
        await asyncio.gather(*(ask(client) for _ in range(clients)))
        seconds = time.monotonic() - began
        latencies.shares.append((time.process_time() - worked) / seconds / (os.cpu_count() or 1))
        return made / seconds


def report(rates: dict[str, list[float]], latencies: dict[str, Latencies]) -> None:
    """Print medians, and percentiles of the latencies."""
    for name, found in rates.items():
        print(f"{name:8} {statistics.median(found):7.1f} tokens/s   ({', '.join(f'{one:.1f}' for one in found)})")
    for other in (name for name in rates if name != "server"):
        ratios = [one / two for one, two in zip(rates["server"], rates[other], strict=True)]
        print(f"server / {other}: {statistics.median(ratios):.3f}   ({', '.join(f'{one:.3f}' for one in ratios)})")
    for name, seen in latencies.items():
        for what, seconds in (("first token", seen.first), ("between chunks", seen.between)):
            cuts = statistics.quantiles(seconds, n=100)
            print(
                f"{name}, {what}: {1000 * cuts[49]:.0f} ms in the median, {1000 * cuts[98]:.0f} at the 99th percentile"
            )
        print(f"{name}: clients took {statistics.median(seen.shares):.1%} of the processor")


if __name__ == "__main__":
    main()
