"""Tree "auto" against plain decoding on classes of requests, in turns: milliseconds a new token, prompts included.

    python benchmarks/auto.py [--target qwen2.5-coder-1.5b] [--draft qwen2.5-coder-0.5b] [--repeats 3] [--only 1000]

Prompts are modules of Python to go on with, and pages of this project with a question.
"""

import argparse
import calendar
import csv
import heapq
import inspect
import shlex
import statistics
import textwrap
import time
from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from typing import Any

import mcsd

SHORT = (
    "def quicksort(items):\n",
    "# Read a CSV file and print the sum of each column.\nimport csv\n",
    "The history of Rome begins",
    "class Stack:\n    def __init__(self):\n",
    "Once upon a time, in a small village,",
    "def fibonacci(n: int) -> int:\n",
    "List three uses of graphs:\n1.",
    "SELECT name, count(*) FROM",
)
CLASSES = (
    # Tokens of the prompt (0: short ones), new tokens, prompts, sequences that run together, temperature, seed.
    (0, 16, 4, 1, 0.0, None),
    (0, 64, 4, 1, 0.0, None),
    (0, 256, 1, 1, 1.0, None),
    (0, 64, 4, 1, 1.0, 1),
    (0, 64, 4, 1, 1.5, None),
    (600, 64, 4, 1, 0.0, None),
    (1000, 64, 3, 1, 1.0, None),
    (1500, 16, 2, 1, 0.0, None),
    (2000, 64, 1, 1, 0.0, None),
    (1000, 256, 1, 1, 0.0, None),
    (0, 64, 8, 8, 1.0, None),
    (0, 48, 8, 8, 1.5, 1),
)


def long_prompts(engine: mcsd.Engine, length: int) -> list[list[int]]:
    """Prompts of about so many tokens."""
    tokenizer: Any = engine.tokenizer
    encode, decode = tokenizer.encode, tokenizer.decode
    pages = [(Path(__file__).parents[1] / name).read_text() for name in ("README.md", "docs/theory.md")]
    sources = [inspect.getsource(module) for module in (textwrap, argparse, heapq, shlex, calendar, csv)]
    texts = [encode(source)[:length] for source in sources if len(encode(source)) >= length]
    page = decode(encode(pages[0])[: length - 40])
    asked = f"{page}\n\nSummarize the text above in five sentences."
    return [texts[0], engine.chat_tokens([{"role": "user", "content": asked}]), *texts[1:]]


def milliseconds(
    engine: mcsd.Engine, prompts: Sequence[list[int]], together: int, params: mcsd.SamplingParams
) -> float:
    """The time of a new token."""
    start, tokens = time.perf_counter(), 0
    for first in range(0, len(prompts), together):
        tokens += sum(len(done.token_ids) for done in engine.generate(list(prompts[first : first + together]), params))
    return 1000 * (time.perf_counter() - start) / tokens


def main() -> None:
    """Time each class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="qwen2.5-coder-1.5b")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", type=int, help="tokens of the prompts")
    args = parser.parse_args()
    auto = mcsd.Engine.load(args.target, draft=args.draft, max_batch=8, prefix_cache=0)
    plain = mcsd.Engine(auto.target, "ngram", auto.tokenizer, "none", max_batch=8, prefix_cache=0)
    tokenizer: Any = auto.tokenizer
    short = [tokenizer.encode(text) for text in SHORT]
    auto.generate([short[0]], max_new_tokens=8)
    ratios = []
    for length, new, count, together, temperature, seed in CLASSES:
        if args.only is not None and length != args.only:
            continue
        prompts = (long_prompts(auto, length) if length else short)[:count]
        params = mcsd.SamplingParams(temperature=temperature, max_new_tokens=new, seed=seed, ignore_eos=True)
        times: dict[str, list[float]] = {"plain": [], "auto": []}
        for turn in range(args.repeats):
            for name, engine in (("plain", plain), ("auto", auto))[:: 1 if turn % 2 else -1]:
                times[name].append(milliseconds(engine, prompts, together, params))
        medians = {name: statistics.median(each) for name, each in times.items()}
        ratios.append(medians["plain"] / medians["auto"])
        what = f"{length or 'some 10'} + {new} tokens, batch {together}, T = {temperature}, seed {seed}"
        print(f"{what:58} plain {medians['plain']:6.1f}  auto {medians['auto']:6.1f}  {ratios[-1]:.2f}", flush=True)
    print(f"geometric mean {exp(statistics.mean(map(log, ratios))):.2f}, least {min(ratios):.2f}")


if __name__ == "__main__":
    main()
