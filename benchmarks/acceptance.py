"""Acceptance of one level of candidates, for k = 1, 2, 4 with and without replacement, on text that the target wrote.

The target answers the prompts, once at each temperature; the rest is `mcsd.bench.acceptance`. The acceptance is the
share of positions where one of k candidates is accepted. The cost is the time of drafting one level in one row, as a
share of the target's forward of one token. ``mcsd bench`` draws curves; this compares any number of drafts.

    python benchmarks/acceptance.py --target smollm2-135m --drafts ngram smollm2-135m-head --prompts FILE.jsonl ...
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mcsd
from mcsd.bench.acceptance import WIDEST, accepted_within, read
from mcsd.models import Block
from mcsd.models.loading import choose_dtype, load, load_draft
from mcsd.rng import DRAW, Stream
from mcsd.sampling import Settings
from mcsd.schemes import SCHEMES
from speed import CPU, spaced

WIDTHS = (1, 2, 4)
DRAWN = ("mcss", "mcss-wor")
DRAWS = 4


def main() -> None:
    """Measure and print a table; the JSON goes to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--drafts", nargs="+", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--each", type=int, default=20, help="prompts of each file, evenly spaced")
    parser.add_argument("--new", type=int, default=64, help="new tokens at most")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    target = load(args.target, CPU, choose_dtype(args.dtype, CPU))
    engine_of = partial(mcsd.Engine, target.model, tokenizer=target.tokenizer, max_length=1024)
    plain = engine_of(tree="none", max_batch=args.each)
    proposers = {draft: draft if draft == "ngram" else load_draft(draft, target) for draft in args.drafts}
    engines = {draft: engine_of(proposer, tree=str(WIDEST), max_batch=DRAWS) for draft, proposer in proposers.items()}
    costs = {draft: share_of_a_target_forward(engine) for draft, engine in engines.items()}
    rows: list[dict[str, Any]] = []
    for path in args.prompts:
        prompts = [plain.chat_tokens([{"role": "user", "content": text}]) for text in spaced(path, args.each)]
        for temperature in args.temperatures:
            params = mcsd.SamplingParams(temperature=temperature, max_new_tokens=args.new, seed=1)
            written = [list(done.token_ids) for done in plain.generate(prompts, params)]
            for draft, engine in engines.items():
                found = acceptance(engine, prompts, written, params)
                rows.append({"draft": draft, "prompts": path.stem, "T": temperature, "cost": costs[draft], **found})
                cells = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
                print(f"{draft}  {path.stem}  T={temperature:g}  cost {costs[draft]:.1%}  {cells}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


def acceptance(
    engine: mcsd.Engine, prompts: list[list[int]], written: list[list[int]], params: mcsd.SamplingParams
) -> dict[str, float]:
    """The share of positions of all answers where one of k candidates is accepted, by scheme and k."""
    # At temperature 0 candidates are the likeliest ones, whatever the scheme.
    drawn = engine.drafter.draws and params.temperature > 0
    schemes, draws = (DRAWN, DRAWS) if drawn else (DRAWN[-1:], 1)
    answers = [read(engine, prompt, answer) for prompt, answer in zip(prompts, written, strict=True)]
    tried = draws * sum(map(len, written))
    found: dict[str, float] = {}
    for scheme in schemes:
        counts = [accepted_within(engine, answer, params, scheme, draws) for answer in answers]
        found |= {f"{scheme} {k}": sum(count[k - 1] for count in counts) / tried for k in WIDTHS}
    return found


def share_of_a_target_forward(engine: mcsd.Engine, tokens: int = 200) -> float:
    """Median time of drafting a level, over that of the target's forward of a token, after 200 tokens of one row."""
    if engine.draft_name == "ngram":
        return 0.0
    target, drafter = engine.target, engine.drafter
    cache = target.new_cache(1, tokens + 8)
    cache.add()
    text = torch.randint(1000, (1, tokens)).tolist()[0]
    states = target.forward(torch.tensor([text]), Block.chain(tokens), cache, hidden=drafter.hidden).hidden
    drafter.add(text, None if states is None else states[:, :-1])
    cache.commit(torch.arange(tokens)[None], torch.tensor([tokens]))
    settings = Settings.of([mcsd.SamplingParams()], CPU)
    shape, scheme = mcsd.TreeShape.parse("1"), SCHEMES["mcss-wor"]()
    drafter.read([text])
    drafting, forwards = [], []
    last = None if states is None else states[:, -1:]
    for step in range(30):
        random = Stream(torch.zeros(1, dtype=torch.int64), torch.tensor([step]), DRAW)
        drafting.append(timed(lambda: drafter.draft([text], shape, scheme, settings, random)))  # noqa: B023
        drafter.commit(torch.full((1, 1), -1), torch.zeros(1, dtype=torch.int64), last)
        text = [*text, 7]
        forwards.append(timed(lambda: target.forward(torch.tensor([[7]]), Block.chain(1), cache)))
    drafter.clear()
    return statistics.median(drafting[5:]) / statistics.median(forwards[5:])


def timed(run: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
