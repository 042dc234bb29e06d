"""Acceptance of one level of k candidates, for every k, along text that the target generated.

At every position the drafter proposes `MAX_CANDIDATES` candidates and the scheme verifies them with the target's own
logits. The schemes compared here check candidates in the order in which they were drawn, and neither the draws nor the
checks depend on how many follow. So the first k candidates are those of a tree of k, and one run gives the acceptance
of every k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mcsd.drafters import Drafter
from mcsd.engine import Engine
from mcsd.models.prefill import score_text
from mcsd.params import SamplingParams
from mcsd.rng import DRAW, VERIFY, PhiloxStream
from mcsd.sampling import BatchSamplingParams
from mcsd.schemes import SCHEMES, TokenHistory
from mcsd.tree import TreeShape

MAX_CANDIDATES = 8

COMPARED_SCHEMES = ("mcss-wor", "mcss", "naive")
"""Drawn without replacement, with replacement, and without replacement but verified naively."""

DRAWS = 32
"""Draws of candidates at each position: enough to tell schemes apart on few texts."""


@dataclass(frozen=True)
class ScoredText:
    """A prompt and an answer, read by the target.

    Attributes:
        prompt_length: tokens of the prompt.
        tokens: of prompt and answer.
        logits: ``[m, V]``, after the prompt and after each token of the answer but its last.
        hidden: ``[n, F]``, the target's hidden states that the drafter uses, of each token; None if it uses none.
    """

    prompt_length: int
    tokens: list[int]
    logits: Tensor
    hidden: Tensor | None


def score_answer(engine: Engine, prompt: list[int], answer: list[int]) -> ScoredText:
    """One forward of an engine's target over a prompt and an answer, which is not empty."""
    tokens = [*prompt, *answer]
    output = score_text(engine.target, tokens, engine.drafter.hidden_layers)
    logits = output.logits[0, len(prompt) - 1 : -1].clone()
    return ScoredText(len(prompt), tokens, logits, None if output.hidden is None else output.hidden[0])


@torch.no_grad()
def count_accepted(engine: Engine, text: ScoredText, params: SamplingParams, scheme: str, draws: int) -> list[int]:
    """How often one of the first k candidates is accepted, over all positions of an answer and all draws at each.

    Args:
        engine: its drafter proposes; it is idle, and its ``max_batch`` is at least ``draws``.
        text: scored by `score_answer` with this engine.
        params: temperature and truncation. At temperature 0 one draw is enough.
        scheme: a name in `COMPARED_SCHEMES`; a drafter that does not sample is verified by "top-k".
        draws: of candidates at each position; they run as sequences of a batch.

    Returns:
        `MAX_CANDIDATES` counts, for k = 1, 2, ...
    """
    drafter, device = engine.drafter, engine.target.device
    verifier = SCHEMES[scheme if drafter.is_sampled else "top-k"]()
    shape = TreeShape.parse(str(MAX_CANDIDATES))
    sampling = BatchSamplingParams.of([params] * draws, device)
    prompt = text.tokens[: text.prompt_length]
    _add_sequences(drafter, text, draws)
    accepted_at = torch.zeros(MAX_CANDIDATES, dtype=torch.int64, device=device)
    for step, logits in enumerate(text.logits):
        tokens = text.tokens[: text.prompt_length + step]
        seeds, position = torch.arange(draws, device=device), torch.full((draws,), step, device=device)
        drafter.catch_up([tokens] * draws)
        tree = drafter.draft([tokens] * draws, shape, verifier, sampling, PhiloxStream(seeds, position, DRAW))
        node_logits = logits.expand(draws, 1 + len(tree.shape), -1)
        history = TokenHistory([prompt] * draws, [tokens[text.prompt_length :]] * draws)
        result = verifier.verify(tree, node_logits, sampling, history, PhiloxStream(seeds, position, VERIFY))
        if tree.shape.depth:
            accepted = result.path[:, 0]
            accepted_at += torch.bincount(accepted[accepted >= 0], minlength=MAX_CANDIDATES)
        # The next position continues the target's text, so all candidates are dropped.
        empty_path = torch.full((draws, tree.shape.depth), -1, device=device)
        drafter.commit(empty_path, [[]] * draws, _root_hidden(text, step, draws))
    drafter.clear()
    return accepted_at.cumsum(0).tolist()


def _add_sequences(drafter: Drafter, text: ScoredText, draws: int) -> None:
    prompt = text.tokens[: text.prompt_length]
    hidden = None if text.hidden is None or len(prompt) == 1 else text.hidden[None, : len(prompt) - 1]
    for _ in range(draws):
        drafter.add(prompt, hidden)


def _root_hidden(text: ScoredText, step: int, draws: int) -> Tensor | None:
    """Hidden states of the root, ``[draws, 1, F]``."""
    if text.hidden is None:
        return None
    root = text.prompt_length + step - 1
    return text.hidden[root : root + 1].expand(draws, -1, -1)
