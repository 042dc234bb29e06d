"""Throughput and latency of ``mcsd serve`` against the bare engine, and against plain decoding of one request.

    python benchmarks/serving.py --target qwen2.5-coder-1.5b --draft qwen2.5-coder-0.5b

Each round makes the same texts three times: the engine with all prompts at once; clients of the server (one process,
streamed answers, each client asks again when its answer has ended); and the engine without candidates, one prompt after
the other. Prints tokens per second, their ratios (medians of rounds), and what clients see: the time to the first
token, and between the chunks of a text, each of which has the tokens of a step.
"""

import argparse
import asyncio
import json
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

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "ignore_eos": True}
"""Whatever a model's own defaults are."""


@dataclass
class Latencies:
    """What clients have seen, in seconds.

    Attributes:
        first: from a request to its first tokens.
        between: between the chunks of a text.
    """

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)

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
    args = parser.parse_args()
    engine = mcsd.Engine.load(args.target, args.draft, tree=args.tree, max_batch=args.clients)
    plain = mcsd.Engine(engine.target, "ngram", engine.tokenizer, tree="none")
    texts = default_prompts(engine.encoder)
    prompts = [texts[i % len(texts)] for i in range(args.clients * args.requests)]
    latencies = Latencies()
    rates: dict[str, list[float]] = {"engine": [], "server": [], "plain": []}
    with served(args) as url:
        for number in range(args.rounds + 1):
            rates["engine"].append(engine_rate(engine, prompts, args.tokens))
            rates["server"].append(asyncio.run(server_rate(url, prompts, args.clients, args.tokens, latencies)))
            rates["plain"].append(
                statistics.mean(engine_rate(plain, [prompt], args.tokens) for prompt in prompts[: args.plain])
            )
            if not number:
                # The first round warms up.
                rates, latencies = {name: [] for name in rates}, Latencies()
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
            body = {**SAMPLING, "prompt": prompt, "seed": seed, "max_tokens": tokens}
            times = [time.monotonic()]
            async with client.stream(
                "POST", "/v1/completions", json=body | {"stream": True, "return_token_ids": True}
            ) as response:
                assert response.status_code == 200
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        times.append(time.monotonic())
                        made += len(json.loads(line[6:])["choices"][0]["token_ids"])
            latencies.add(times)

    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        began = time.monotonic()
        await asyncio.gather(*(ask(client) for _ in range(clients)))
        return made / (time.monotonic() - began)


def report(rates: dict[str, list[float]], latencies: Latencies) -> None:
    """Print medians, and percentiles of the latencies."""
    for name, found in rates.items():
        print(f"{name:8} {statistics.median(found):7.1f} tokens/s   ({', '.join(f'{one:.1f}' for one in found)})")
    for other in ("engine", "plain"):
        ratios = [one / two for one, two in zip(rates["server"], rates[other], strict=True)]
        print(f"server / {other}: {statistics.median(ratios):.3f}   ({', '.join(f'{one:.3f}' for one in ratios)})")
    for name, seconds in (("first token", latencies.first), ("between chunks", latencies.between)):
        cuts = statistics.quantiles(seconds, n=100)
        print(f"{name}: {1000 * cuts[49]:.0f} ms in the median, {1000 * cuts[98]:.0f} ms at the 99th percentile")


if __name__ == "__main__":
    main()
