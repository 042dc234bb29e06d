"""Speed of mcsd's trees against plain decoding in the same engine, and against transformers on the same weights.

All systems answer the same prompts in one process, interleaved prompt by prompt, so that a machine whose speed drifts
drifts for all alike. Figures are ratios of total tokens per second, with the range of the ratios by prompt.

    python benchmarks/speed.py --prompts FILE.jsonl [FILE.jsonl ...] --each 3
    python benchmarks/speed.py --target smollm2-135m --drafts smollm2-135m-head --trees chain:3 2x1 --against none ...

A tree runs with each draft. ``--against`` names what ratios are to: generate, lookup (its prompt look-up), assisted
(with the first draft, which must be a model then), none (mcsd plain). Others run in processes of their own, which wait
while it is not their turn: ``--peer NAME COMMAND`` starts one, see ``benchmarks/peers``, and NAME may be in --against.

    python benchmarks/speed.py ... --peer llama.cpp "ENVIRONMENT/bin/python benchmarks/peers/llamacpp.py FILE.gguf"

A prompts file holds a JSON object a line with a field "prompt"; answers are asked for in the chat template.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mcsd
from mcsd.bench.assisted import answer
from mcsd.drafters import HeadDrafter, ModelDrafter
from mcsd.models.loading import choose_dtype, load, load_draft, read

CPU = torch.device("cpu")

_LOOKED_UP = 3
"""Tokens that transformers' prompt look-up proposes."""


class Run(NamedTuple):
    """One answer: new tokens, wall seconds, and what the engine says of it."""

    tokens: int
    seconds: float
    completion: mcsd.Completion | None


def main() -> None:
    """Time the systems and print a table; the JSON goes to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="qwen2.5-coder-1.5b")
    parser.add_argument("--drafts", nargs="+", default=["qwen2.5-coder-0.5b"])
    parser.add_argument("--trees", nargs="+", default=["2x2x1"])
    parser.add_argument("--against", nargs="+", default=["generate", "assisted", "none"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", help="of mcsd's target and drafts; transformers runs in the dtype")
    parser.add_argument("--compile", action="store_true", help="mcsd's target and drafts")
    parser.add_argument("--peer", nargs=2, action="append", default=[], metavar=("NAME", "COMMAND"))
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--each", type=int, default=3, help="prompts of each file, evenly spaced")
    parser.add_argument("--new", type=int, default=64, help="new tokens at most")
    parser.add_argument("--repeats", type=int, default=1, help="times that each prompt is answered; medians count")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--out", type=Path, help="the table as JSON")
    parser.add_argument("--figure", type=Path, help="the table as bars: SVG, PNG or PDF")
    args = parser.parse_args()

    torch.set_grad_enabled(False)
    prompts = [prompt for path in args.prompts for prompt in spaced(path, args.each)]
    dtype = choose_dtype(args.dtype, CPU)
    peer = read(args.target, dtype)[0] if {"generate", "lookup", "assisted"} & {*args.against} else None
    helper = read(args.drafts[0], dtype)[0] if "assisted" in args.against else None
    others = {name: Peer(shlex.split(command)) for name, command in args.peer}
    plain, engines = systems_of(args.target, args.drafts, args.trees, args.dtype, args.quantize, args.compile)
    timers = {name: ForwardTimer(engine) for name, engine in engines.items()}

    rows: list[dict[str, Any]] = []
    for temperature in args.temperatures:
        at = {"temperature": temperature, "new": args.new}
        systems: dict[str, Callable[..., Run]] = {}
        helps: dict[str, dict[str, Any]] = {
            "generate": {},
            "lookup": {"prompt_lookup_num_tokens": _LOOKED_UP},
            "assisted": {"assistant_model": helper},
        }
        systems |= {name: partial(hf, peer, **at, **help) for name, help in helps.items() if name in args.against}
        systems |= {name: partial(other, **at) for name, other in others.items()}
        systems["none"] = partial(ours, plain, **at)
        systems |= {name: partial(ours, engine, **at) for name, engine in engines.items()}
        ids = plain.chat_tokens([{"role": "user", "content": prompts[0]}])
        for run in systems.values():
            run(ids, 0)
        for timer in timers.values():
            timer.seconds = 0.0
        results: dict[str, list[Run]] = {name: [] for name in systems}
        spent = dict.fromkeys(timers, 0.0)
        for number, prompt in enumerate(prompts):
            ids = plain.chat_tokens([{"role": "user", "content": prompt}])
            answers: dict[str, list[Run]] = {name: [] for name in systems}
            for _ in range(args.repeats):
                for name, run in systems.items():
                    answers[name].append(run(ids, number))
            for name, runs in answers.items():
                results[name].append(sorted(runs, key=lambda run: run.seconds)[len(runs) // 2])
                if name in spent:
                    spent[name] += sum(run.seconds for run in runs)
            print(f"T={temperature:g} prompt {number + 1}/{len(prompts)}", file=sys.stderr)
        outside = {name: 1 - timer.seconds / spent[name] for name, timer in timers.items()}
        rows += table(temperature, results, [name for name in args.against if name in results], outside)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))
    if args.figure:
        draw(rows, args.against[0], args.figure)


def systems_of(
    target: str, drafts: list[str], trees: list[str], dtype: str, quantize: str | None, compile: bool
) -> tuple[mcsd.Engine, dict[str, mcsd.Engine]]:
    """A plain engine, and one for each draft and tree. All share the weights and none the wrappers, which are timed."""
    loaded = load(target, CPU, choose_dtype(dtype, CPU), quantize=quantize, compile=compile)
    engines = {}
    for draft in drafts:
        proposer = draft if draft == "ngram" else load_draft(draft, loaded, quantize, compile)
        for tree in trees:
            engines[f"{draft} {tree}"] = mcsd.Engine(
                copy(loaded.model), copy(proposer), loaded.tokenizer, tree=tree, max_batch=1
            )
    return mcsd.Engine(copy(loaded.model), tokenizer=loaded.tokenizer, tree="none", max_batch=1), engines


class Peer:
    """A system in a process of its own: a JSON object a line in, one a line out."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, ids: list[int], seed: int, *, temperature: float, new: int) -> Run:
        """Answer one prompt."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"ids": ids, "seed": seed, "temperature": temperature, "new": new}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Run(answer["tokens"], answer["seconds"], None)


class ForwardTimer:
    """Wall time that an engine spends inside forwards of its models."""

    def __init__(self, engine: mcsd.Engine) -> None:
        self.seconds = 0.0
        assert isinstance(engine.drafter, HeadDrafter | ModelDrafter)
        draft = engine.drafter.head if isinstance(engine.drafter, HeadDrafter) else engine.drafter.model
        for model in (engine.target, draft):
            setattr(model, "forward", self._timed(model.forward))  # noqa: B010 (mypy will not have a method assigned)

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            output = forward(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return output

        return timed


def spaced(path: Path, count: int) -> list[str]:
    """``count`` prompts of a file, evenly spaced."""
    lines = path.read_text().splitlines()
    return [json.loads(lines[i * len(lines) // count])["prompt"] for i in range(count)]


def hf(model: Any, ids: list[int], seed: int, *, temperature: float, new: int, **options: Any) -> Run:
    """``model.generate`` at the same settings."""
    start = time.perf_counter()
    tokens = answer(model, ids, seed, temperature, new, **options)
    return Run(len(tokens), time.perf_counter() - start, None)


def ours(engine: mcsd.Engine, ids: list[int], seed: int, *, temperature: float, new: int) -> Run:
    """The same request through an engine."""
    params = mcsd.SamplingParams(temperature=temperature, max_new_tokens=new, seed=seed)
    start = time.perf_counter()
    (done,) = engine.generate([ids], params)
    return Run(len(done.token_ids), time.perf_counter() - start, done)


def table(
    temperature: float, results: dict[str, list[Run]], against: list[str], outside: dict[str, float]
) -> list[dict[str, Any]]:
    """Print and return a row a system; the range is that of the ratios to the first of ``against``, by prompt."""
    rows = []
    base = results[against[0]]
    print(f"\ntemperature {temperature:g}: {len(base)} prompts")
    print(
        f"{'system':<32}{'ms/token':>9}" + "".join(f"{'x ' + name:>11}" for name in against) + "   by prompt  accepted"
    )
    for name, runs in results.items():
        each = sorted(rate([run]) / rate([other]) for run, other in zip(runs, base, strict=True))
        row: dict[str, Any] = {
            "temperature": temperature,
            "system": name,
            "ms_per_token": 1e3 / rate(runs),
            "times": {other: rate(runs) / rate(results[other]) for other in against},
            "by_prompt": [each[0], statistics.median(each), each[-1]],
        }
        done = [run.completion for run in runs if run.completion]
        if done:
            calls = sum(completion.stats.target_calls for completion in done)
            row["mean_acceptance_length"] = sum(run.tokens for run in runs) / calls
            row["seconds"] = {part: sum(c.stats.seconds[part] for c in done) for part in done[0].stats.seconds}
        if name in outside:
            row["outside_forwards"] = outside[name]
        rows.append(row)
        print(
            f"{name:<32}{row['ms_per_token']:>9.1f}"
            + "".join(f"{ratio:>11.2f}" for ratio in row["times"].values())
            + f"{each[0]:>7.2f}–{each[-1]:.2f}{row.get('mean_acceptance_length', 1):>9.2f}"
            + (f"   outside forwards {row['outside_forwards']:.1%}" if name in outside else "")
        )
    return rows


def draw(rows: list[dict[str, Any]], base: str, path: Path) -> None:
    """A bar a system, how many times as fast as ``base`` it is; a panel a temperature."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    temperatures = sorted({row["temperature"] for row in rows})
    height = 1.2 + 0.3 * len(rows) / len(temperatures)
    figure, panels = pyplot.subplots(
        1, len(temperatures), figsize=(5 * len(temperatures), height), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, temperature in zip(panels[0], temperatures, strict=True):
        shown = [row for row in rows if row["temperature"] == temperature]
        bars = panel.barh([row["system"] for row in shown], [row["times"][base] for row in shown])
        panel.bar_label(bars, fmt=" %.2f")
        panel.margins(x=0.12)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set(title=f"temperature {temperature:g}", xlabel=f"times as fast as {base}")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].invert_yaxis()  # All share it.
    figure.savefig(path)


def rate(runs: list[Run]) -> float:
    """Tokens per second of all runs together."""
    return sum(run.tokens for run in runs) / sum(run.seconds for run in runs)


if __name__ == "__main__":
    main()
