"""Speed against transformers on the same weights: generate, assisted generation, mcsd plain, mcsd.

All systems answer the same prompts in one process, interleaved prompt by prompt, so that a machine whose speed drifts
drifts for all alike. Figures are ratios of total tokens per second, with the range of the ratios by prompt.

    python benchmarks/speed.py --prompts FILE.jsonl [FILE.jsonl ...] --each 3

A prompts file holds a JSON object a line with a field "prompt"; answers are asked for in the chat template.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, GgufConfig

import mcsd
from mcsd.catalog import locate
from mcsd.drafters import ModelDrafter
from mcsd.models import TransformersModel


class Run(NamedTuple):
    """One answer: new tokens, wall seconds, and what the engine says of it."""

    tokens: int
    seconds: float
    completion: mcsd.Completion | None


def main() -> None:
    """Time the systems and print a table; the JSON goes to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="qwen2.5-coder-1.5b")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b")
    parser.add_argument("--tree", default="2x2x1")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--each", type=int, default=3, help="prompts of each file, evenly spaced")
    parser.add_argument("--new", type=int, default=64, help="new tokens at most")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    torch.set_grad_enabled(False)
    prompts = [prompt for path in args.prompts for prompt in spaced(path, args.each)]
    target, draft = (reference(name, args.dtype) for name in (args.target, args.draft))
    load = {"target": args.target, "draft": args.draft, "dtype": args.dtype, "max_batch": 1}
    engine = mcsd.Engine.load(tree=args.tree, **load)
    assert isinstance(engine.target, TransformersModel)
    plain = mcsd.Engine(TransformersModel(engine.target.network), tokenizer=engine.tokenizer, tree="none", max_batch=1)
    timer = ForwardTimer(engine)

    rows: list[dict[str, Any]] = []
    for temperature in args.temperatures:
        at = {"temperature": temperature, "new": args.new}
        systems: dict[str, Callable[..., Run]] = {
            "generate": partial(hf, target, **at),
            "assisted": partial(hf, target, assistant_model=draft, **at),
            "mcsd none": partial(ours, plain, **at),
            f"mcsd {args.tree}": partial(ours, engine, **at),
        }
        ids = engine.chat_tokens([{"role": "user", "content": prompts[0]}])
        for run in systems.values():
            run(ids, 0)
        timer.seconds = 0.0
        results: dict[str, list[Run]] = {name: [] for name in systems}
        for number, prompt in enumerate(prompts):
            ids = engine.chat_tokens([{"role": "user", "content": prompt}])
            for name, run in systems.items():
                results[name].append(run(ids, number))
            print(f"T={temperature:g} prompt {number + 1}/{len(prompts)}", file=sys.stderr)
        rows += table(temperature, results, timer.seconds)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


class ForwardTimer:
    """Wall time that an engine spends inside forwards of its models."""

    def __init__(self, engine: mcsd.Engine) -> None:
        self.seconds = 0.0
        assert isinstance(engine.drafter, ModelDrafter)
        for model in (engine.target, engine.drafter.model):
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


def reference(name: str, dtype: str) -> Any:
    """The model as transformers itself loads it."""
    location = locate(name)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if location.kind == "gguf":
        options |= {"gguf_file": location.file, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(location.source, **options)


def hf(model: Any, ids: list[int], seed: int, *, temperature: float, new: int, **options: Any) -> Run:
    """``model.generate`` at the same settings; its own top_k=50 is switched off."""
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    inputs = torch.tensor([ids])
    start = time.perf_counter()
    # The repetition penalty and top_p of the weights' own generation config are switched off too.
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=new,
        repetition_penalty=1.0,
        top_p=1.0 if temperature else None,
        **sampling,
        **options,
    )
    return Run(output.shape[1] - len(ids), time.perf_counter() - start, None)


def ours(engine: mcsd.Engine, ids: list[int], seed: int, *, temperature: float, new: int) -> Run:
    """The same request through an engine."""
    params = mcsd.SamplingParams(temperature=temperature, max_new_tokens=new, seed=seed)
    start = time.perf_counter()
    (done,) = engine.generate([ids], params)
    return Run(len(done.token_ids), time.perf_counter() - start, done)


def table(temperature: float, results: dict[str, list[Run]], forwards: float) -> list[dict[str, Any]]:
    """Print and return a row a system."""
    rows = []
    base = results["generate"]
    print(f"\ntemperature {temperature:g}: {len(base)} prompts")
    print(f"{'system':<14}{'ms/token':>9}{'x generate':>11}{'by prompt':>15}{'x assisted':>11}{'accepted':>9}")
    for name, runs in results.items():
        speed = rate(runs)
        each = sorted(rate([run]) / rate([other]) for run, other in zip(runs, base, strict=True))
        row: dict[str, Any] = {
            "temperature": temperature,
            "system": name,
            "ms_per_token": 1e3 / speed,
            "times_generate": speed / rate(base),
            "times_assisted": speed / rate(results["assisted"]),
            "times_generate_by_prompt": [each[0], statistics.median(each), each[-1]],
        }
        done = [run.completion for run in runs if run.completion]
        if done:
            calls = sum(completion.stats.target_calls for completion in done)
            row["mean_acceptance_length"] = sum(run.tokens for run in runs) / calls
            row["seconds"] = {part: sum(c.stats.seconds[part] for c in done) for part in done[0].stats.seconds}
        if done and not name.endswith("none"):
            row["outside_forwards"] = 1 - forwards / sum(run.seconds for run in runs)
        rows.append(row)
        print(
            f"{name:<14}{row['ms_per_token']:>9.1f}{row['times_generate']:>11.2f}"
            f"{each[0]:>7.2f}–{each[-1]:.2f}   {row['times_assisted']:>8.2f}"
            f"{row.get('mean_acceptance_length', 1):>9.2f}"
            + (f"   outside forwards {row['outside_forwards']:.1%}" if "outside_forwards" in row else "")
        )
    return rows


def rate(runs: list[Run]) -> float:
    """Tokens per second of all runs together."""
    return sum(run.tokens for run in runs) / sum(run.seconds for run in runs)


if __name__ == "__main__":
    main()
