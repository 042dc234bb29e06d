"""Acceptance of one level of candidates along text that the target wrote; drafters and schemes as the engine runs them.

At every position the drafter proposes `WIDEST` candidates and the scheme judges them with the target's own logits. The
schemes compared here look at candidates one after the other, in the order in which they were drawn, and neither draw
nor judgement depends on how many follow; so the first k of them are what a tree of k would have drawn, and one run
gives the acceptance of every k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mcsd.drafters import Drafter
from mcsd.engine import Engine
from mcsd.models.prefill import forward_over
from mcsd.params import SamplingParams
from mcsd.rng import DRAW, JUDGE, Stream
from mcsd.sampling import Settings
from mcsd.schemes import SCHEMES, Texts
from mcsd.tree import TreeShape

WIDEST = 8

COMPARED = ("mcss-wor", "mcss", "naive")
"""Without replacement, with replacement, and the naive verification of the former."""

DRAWS = 32
"""Times that candidates are drawn at a position, to tell schemes apart on few texts."""


@dataclass(frozen=True)
class Answer:
    """Prompt and answer as the target reads them.

    Attributes:
        prompt: tokens of the prompt; tokens: of both.
        logits: ``[m, V]``, after the prompt and after each token of the answer but its last.
        states: ``[n, F]``, the target's states that the drafter asks for at each token.
    """

    prompt: int
    tokens: list[int]
    logits: Tensor
    states: Tensor | None


def read(engine: Engine, prompt: list[int], answer: list[int]) -> Answer:
    """One forward of an engine's target over a prompt and an answer that is not empty."""
    text = [*prompt, *answer]
    output = forward_over(engine.target, text, engine.drafter.hidden)
    logits = output.logits[0, len(prompt) - 1 : -1].clone()
    return Answer(len(prompt), text, logits, None if output.hidden is None else output.hidden[0])


@torch.no_grad()
def accepted_within(engine: Engine, answer: Answer, params: SamplingParams, scheme: str, draws: int) -> list[int]:
    """How often one of the first k candidates is accepted, over all positions of an answer and all draws at each.

    Args:
        engine: whose drafter proposes; it is idle, and has at least ``draws`` rows.
        answer: read by `read` with this engine.
        params: temperature and truncation. At temperature 0 one draw says all.
        scheme: a name in `COMPARED`; a drafter that does not draw is judged as "top-k".
        draws: how many at each position; they run as rows of a batch.

    Returns:
        `WIDEST` counts, for k = 1, 2, ...
    """
    drafter, device = engine.drafter, engine.target.device
    judge = SCHEMES[scheme if drafter.draws else "top-k"]()
    shape = TreeShape.parse(str(WIDEST))
    settings = Settings.of([params] * draws, device)
    prompt = answer.tokens[: answer.prompt]
    _begin(drafter, answer, draws)
    first = torch.zeros(WIDEST, dtype=torch.int64, device=device)
    for step, logits in enumerate(answer.logits):
        text = answer.tokens[: answer.prompt + step]
        seeds, place = torch.arange(draws, device=device), torch.full((draws,), step, device=device)
        drafter.read([text] * draws)
        tree = drafter.draft([text] * draws, shape, judge, settings, Stream(seeds, place, DRAW))
        nodes = logits.expand(draws, 1 + len(tree.shape), -1)
        texts = Texts([prompt] * draws, [text[answer.prompt :]] * draws)
        verdict = judge.judge(tree, nodes, settings, texts, Stream(seeds, place, JUDGE))
        if tree.shape.depth:
            chosen = verdict.path[:, 0]
            first += torch.bincount(chosen[chosen >= 0], minlength=WIDEST)
        # What the target wrote goes on; the candidates are dropped.
        nothing = torch.full((draws, tree.shape.depth), -1, device=device)
        drafter.commit(nothing, torch.zeros(draws, dtype=torch.int64, device=device), _states(answer, step, draws))
    drafter.clear()
    return first.cumsum(0).tolist()


def _begin(drafter: Drafter, answer: Answer, draws: int) -> None:
    prompt = answer.tokens[: answer.prompt]
    states = None if answer.states is None or len(prompt) == 1 else answer.states[None, : len(prompt) - 1]
    for _ in range(draws):
        drafter.add(prompt, states)


def _states(answer: Answer, step: int, draws: int) -> Tensor | None:
    """Those of the root, ``[draws, 1, F]``."""
    if answer.states is None:
        return None
    root = answer.prompt + step - 1
    return answer.states[root : root + 1].expand(draws, -1, -1)
