"""Acceptance and speed of look-up on code edits, summaries and plain answers, and of predicted output.

    PYTHONPATH=src:benchmarks python -m look_up [--target qwen2.5-coder-1.5b] [--rounds 3] [--new 192]

Plain decoding and look-up (tree "auto") share the target and answer the prompts alternately. Predictions are the plain
answers at temperature 0, a tenth of their tokens replaced, left out or preceded by another one. Speed is that of all
tokens after prefill, of the fastest round of each prompt.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mcsd
from mcsd.prompts import QUESTIONS

PROMPTS = Path(__file__).with_name("prompts.jsonl")
SHARE = 0.1


def damaged(tokens: Sequence[int], seed: int) -> list[int]:
    """Tokens of which a tenth is replaced, left out or preceded by another one."""
    chance, found = random.Random(seed), list[int]()
    for token in tokens:
        change = chance.choice(("replace", "leave out", "insert")) if chance.random() < SHARE else ""
        if change in ("replace", "insert"):
            found.append(chance.choice(tokens))
        if change in ("", "insert"):
            found.append(token)
    return found


def load_tasks() -> list[tuple[str, str]]:
    """Kind and text of every prompt."""
    lines = map(json.loads, PROMPTS.read_text().splitlines())
    return [*((line["kind"], line["prompt"]) for line in lines), *(("plain", question) for question in QUESTIONS)]


def run(target: str, rounds: int, new: int) -> list[dict[str, str | float]]:
    """A row for each kind of prompt and temperature."""
    options: dict[str, Any] = {"max_batch": 1, "max_length": 2048, "sampling_defaults": "mcsd"}
    look_up = mcsd.Engine.load(target, "ngram", tree="auto", **options)
    plain = mcsd.Engine(look_up.target, "ngram", look_up.tokenizer, tree="none", **options)
    tokens: dict[tuple[str, float], list[int]] = defaultdict(lambda: [0, 0])
    best: dict[tuple[str, float, str, int], float] = {}
    for turn in range(rounds):
        for index, (kind, text) in enumerate(load_tasks()):
            prompt = look_up.chat_tokens([{"role": "user", "content": text}])
            for temperature in (0.0, 1.0) if kind == "plain" else (0.0,):
                params = mcsd.SamplingParams(temperature=temperature, max_new_tokens=new, seed=1)
                reference = plain.generate(prompt, params)
                predicted = mcsd.SamplingParams(
                    temperature=0, max_new_tokens=new, prediction=damaged(reference.token_ids, index)
                )
                runs = {"plain": reference, "look-up": look_up.generate(prompt, params)}
                if temperature == 0:
                    runs["prediction"] = look_up.generate(prompt, predicted)
                for name, done in runs.items():
                    seconds = sum(done.stats.seconds.values()) - done.stats.seconds["prefill"]
                    each = seconds / done.stats.new_tokens
                    key = kind, temperature, name, index
                    best[key] = min(each, best.get(key, each))
                    if name != "plain" and not turn:
                        row = tokens[f"{kind} with prediction" if name == "prediction" else kind, temperature]
                        row[0], row[1] = row[0] + done.stats.new_tokens, row[1] + done.stats.target_calls
    rows: list[dict[str, str | float]] = []
    for (name, temperature), (emitted, calls) in tokens.items():
        kind, how = name.split()[0], "prediction" if " " in name else "look-up"
        pairs = [
            (seconds, best[kind, temperature, how, index])
            for (task, heat, runner, index), seconds in best.items()
            if (task, heat, runner) == (kind, temperature, "plain")
        ]
        speedup = sum(plain for plain, _ in pairs) / sum(fast for _, fast in pairs)
        length = round(emitted / calls, 2)
        rows.append(
            {"prompts": name, "temperature": temperature, "acceptance length": length, "times plain": round(speedup, 2)}
        )
    return rows


def main() -> None:
    """Print one JSON line a row."""
    parser = argparse.ArgumentParser(prog="look_up")
    parser.add_argument("--target", default="qwen2.5-coder-1.5b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=192)
    options = parser.parse_args()
    for row in run(options.target, options.rounds, options.new):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
