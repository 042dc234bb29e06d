"""Acceptance of one level of candidates, for k = 1, 2, 4 with and without replacement, on text that the target wrote.

The target answers the prompts, once at each temperature. Along these answers each draft proposes k candidates at every
position, and the scheme judges them with the target's own logits: drafters and schemes as the engine runs them. The
acceptance is the share of positions where one is accepted. The cost is the time of drafting one level in one row, as a
share of the target's forward of one token.

    python benchmarks/acceptance.py --target smollm2-135m --drafts ngram smollm2-135m-head --prompts FILE.jsonl ...
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mcsd
from mcsd.drafters import Drafter
from mcsd.models import Block, LanguageModel, Output
from mcsd.models.loading import choose_dtype, load, load_draft
from mcsd.rng import DRAW, JUDGE, Stream
from mcsd.sampling import Settings
from mcsd.schemes import SCHEMES, Texts
from speed import CPU, spaced

WIDTHS = (1, 2, 4)
DRAWN = ("mcss", "mcss-wor")


@dataclass(frozen=True)
class Answer:
    """Prompt and answer as the target reads them: all tokens, and logits ``[n, V]`` and states ``[n, F]`` of each."""

    prompt: int
    tokens: list[int]
    logits: Tensor
    states: Tensor | None


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
    engine_of = partial(mcsd.Engine, target.model, tokenizer=target.tokenizer, max_batch=args.each, max_length=1024)
    plain = engine_of(tree="none")
    proposers = {draft: draft if draft == "ngram" else load_draft(draft, target) for draft in args.drafts}
    engines = {draft: engine_of(proposer, tree="1") for draft, proposer in proposers.items()}
    costs = {draft: share_of_a_target_forward(engine) for draft, engine in engines.items()}
    rows: list[dict[str, Any]] = []
    for path in args.prompts:
        prompts = [plain.chat_tokens([{"role": "user", "content": text}]) for text in spaced(path, args.each)]
        for temperature in args.temperatures:
            params = mcsd.SamplingParams(temperature=temperature, max_new_tokens=args.new, seed=1)
            written = [done.token_ids for done in plain.generate(prompts, params)]
            for draft, engine in engines.items():
                answers = [read(engine, prompt, answer) for prompt, answer in zip(prompts, written, strict=True)]
                # At temperature 0 candidates are the likeliest ones, whatever the scheme.
                schemes = DRAWN if engine.drafter.draws and temperature else DRAWN[-1:]
                found = {
                    f"{name} {k}": acceptance(engine, answers, params, name, k) for name in schemes for k in WIDTHS
                }
                rows.append({"draft": draft, "prompts": path.stem, "T": temperature, "cost": costs[draft], **found})
                cells = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
                print(f"{draft}  {path.stem}  T={temperature:g}  cost {costs[draft]:.1%}  {cells}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


def read(engine: mcsd.Engine, prompt: list[int], answer: tuple[int, ...]) -> Answer:
    """One forward of the target over prompt and answer."""
    text = [*prompt, *answer]
    output = forward_over(engine.target, text, engine.drafter.hidden)
    return Answer(len(prompt), text, output.logits[0], None if output.hidden is None else output.hidden[0])


def forward_over(model: LanguageModel, tokens: list[int], layers: tuple[int, ...] = ()) -> Output:
    """One forward over a text."""
    cache = model.new_cache(1, len(tokens))
    cache.add()
    return model.forward(torch.tensor([tokens]), Block.chain(len(tokens)), cache, hidden=layers)


def acceptance(engine: mcsd.Engine, answers: list[Answer], params: mcsd.SamplingParams, scheme: str, k: int) -> float:
    """Share of positions of the answers where one of k candidates is accepted; texts run as rows of a batch."""
    drafter: Drafter = engine.drafter
    judge = SCHEMES[scheme if drafter.draws else "top-k"]()
    shape = mcsd.TreeShape.parse(str(k))
    accepted = tried = 0
    answers = sorted(answers, key=lambda answer: len(answer.tokens) - answer.prompt, reverse=True)
    for answer in answers:
        states = answer.states
        drafter.add(answer.tokens[: answer.prompt], None if states is None else states[None, : answer.prompt - 1])
    running = list(answers)
    for step in range(len(answers[0].tokens) - answers[0].prompt):
        while len(running[-1].tokens) - running[-1].prompt <= step:
            drafter.remove(len(running) - 1)
            running.pop()
        count = len(running)
        ends = [answer.prompt + step for answer in running]
        texts = [answer.tokens[:end] for answer, end in zip(running, ends, strict=True)]
        settings = Settings.of([params] * count, CPU)
        seeds, place = torch.arange(count), torch.full((count,), step)
        tree = drafter.draft(texts, shape, judge, settings, Stream(seeds, place, DRAW))
        logits = torch.stack([answer.logits[end - 1] for answer, end in zip(running, ends, strict=True)])
        columns = logits[:, None].expand(-1, 1 + len(tree.shape), -1)
        prompts = [answer.tokens[: answer.prompt] for answer in running]
        emitted = [answer.tokens[answer.prompt : end] for answer, end in zip(running, ends, strict=True)]
        verdict = judge.judge(tree, columns, settings, Texts(prompts, emitted), Stream(seeds, place, JUDGE))
        accepted += int(verdict.accepted.sum())
        tried += count
        # What the target wrote goes on; the candidates are dropped.
        hidden = None
        if running[0].states is not None:
            hidden = torch.stack(
                [a.states[end - 1 : end] for a, end in zip(running, ends, strict=True) if a.states is not None]
            )
        drafter.commit(torch.full((count, tree.shape.depth), -1), torch.zeros(count, dtype=torch.int64), hidden)
    drafter.clear()
    return accepted / tried


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
