"""examples/algorithm.py follows the target's distribution exactly, and its tree attention is right.

The exact tests replace `torch.multinomial` and `torch.rand`, the example's only sources of randomness, and run it once
for every possible sequence of random outcomes. The total must equal the target's distribution to 1e-12.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

FILE = Path(__file__).parents[2] / "examples" / "algorithm.py"
V = 4
START = 0


def load(old: str = "", new: str = "") -> ModuleType:
    """The example as a module, with ``old`` replaced by ``new`` in its source."""
    source = FILE.read_text()
    assert not old or source.count(old) == 1
    module = ModuleType("algorithm")
    exec(compile(source.replace(old, new) if old else source, FILE, "exec"), module.__dict__)
    return module


class Table(torch.nn.Module):
    """A model whose next-token distribution is the row of the last token in a table ``[V, V]``."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, tokens: Tensor, **_: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[tokens].log())


class Outcomes:
    """Answers random draws from a script; after its end, takes the first possible outcome and notes the others."""

    def __init__(self, script: list[int]) -> None:
        self.script, self.probability = script, 1.0
        self.taken: list[int] = []
        self.others: list[list[int]] = []

    def decide(self, weights: Tensor) -> int:
        possible = weights.nonzero()[:, 0].tolist()
        if len(self.taken) < len(self.script):
            outcome = self.script[len(self.taken)]
        else:
            outcome = possible[0]
            self.others += [[*self.taken, other] for other in possible[1:]]
        self.probability *= float(weights[outcome] / weights.sum())
        self.taken.append(outcome)
        return outcome

    def multinomial(self, weights: Tensor, count: int) -> Tensor:
        assert count == 1
        assert (weights >= 0).all()
        return torch.tensor([self.decide(weights)])

    def rand(self, _: tuple[int, ...]) -> "Uniform":
        return Uniform(self)


class Uniform:
    """A number from [0, 1) that is only compared."""

    def __init__(self, outcomes: Outcomes) -> None:
        self.outcomes = outcomes

    def __lt__(self, bound: Tensor) -> bool:
        assert bound >= 0
        return self.outcomes.decide(torch.stack([1 - bound.clamp(max=1), bound.clamp(max=1)])) == 1


def enumerate_outcomes(run: Callable[[], list[int]]) -> Iterator[tuple[list[int], float]]:
    """The result of every sequence of random outcomes, and its probability."""
    scripts: list[list[int]] = [[]]
    while scripts:
        outcomes = Outcomes(scripts.pop())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "multinomial", outcomes.multinomial)
            patch.setattr(torch, "rand", outcomes.rand)
            yield run(), outcomes.probability
        scripts += outcomes.others


def tables(seed: int) -> tuple[Tensor, Tensor]:
    """Target and draft; in both some tokens are impossible, and after most tokens the draft has only two or three."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(V, V, generator=generator, dtype=torch.float64) ** 2 + 0.02
    draft = torch.rand(V, V, generator=generator, dtype=torch.float64) ** 2 + 0.02
    target[1, 2] = target[2, 0] = target[2, 3] = 0
    draft[1, 3] = draft[2, 0] = draft[2, 1] = draft[3, 2] = draft[3, 0] = 0
    return target / target.sum(-1, keepdim=True), draft / draft.sum(-1, keepdim=True)


def text_distribution(table: Tensor, last: int, n: int) -> Tensor:
    """``[V] * n``: the probability of every sequence of n tokens after the token ``last``."""
    if n == 0:
        return torch.ones((), dtype=torch.float64)
    return torch.stack([table[last, token] * text_distribution(table, token, n - 1) for token in range(V)])


def distance(module: ModuleType, counts: tuple[int, ...]) -> float:
    """Total variation between the target's texts of len(counts) + 1 tokens and a step that the target continues."""
    target, draft = tables(seed=0)
    n = len(counts) + 1
    actual, total = torch.zeros([V] * n, dtype=torch.float64), 0.0
    for emitted, probability in enumerate_outcomes(
        lambda: module.speculative_step(Table(target), Table(draft), [2, START], counts)
    ):
        if not 1 <= len(emitted) <= n:
            return 1.0
        actual[tuple(emitted)] += probability * text_distribution(target, emitted[-1], n - len(emitted))
        total += probability
    assert total == pytest.approx(1, abs=1e-12)
    return float((actual - text_distribution(target, START, n)).abs().sum() / 2)


@pytest.mark.parametrize("counts", [(1,), (3,), (V + 1,), (1, 1, 1), (2, 2), (3, 1)], ids=str)
def test_exact_distribution_of_a_step(counts: tuple[int, ...]) -> None:
    assert distance(load(), counts) < 1e-12


def test_exact_distribution_of_a_text() -> None:
    """Several steps, cut at max_new_tokens."""
    module, (target, draft) = load(), tables(seed=1)
    actual = torch.zeros([V] * 3, dtype=torch.float64)
    for (new, steps), probability in enumerate_outcomes(
        lambda: module.generate(Table(target), Table(draft), [START], 3, (2,))
    ):
        assert len(new) == 3
        assert 2 <= steps <= 3
        actual[tuple(new)] += probability
    torch.testing.assert_close(actual, text_distribution(target, START, 3), rtol=0, atol=1e-12)


def test_a_residual_of_zeros_by_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rejection that has probability 0 but for rounding keeps the distribution instead of dividing 0 by 0."""
    target, _ = tables(seed=0)
    monkeypatch.setattr(torch, "rand", lambda _: torch.tensor(1.0))
    (token,) = load().speculative_step(Table(target), Table(target), [START], (2,))
    assert target[START, token] > 0


FAULTS = {
    "residual not updated": ("r_j = residual / residual.sum()", "pass"),
    "residual not normalised": ("r_j = residual / residual.sum()", "r_j = residual"),
    "draft distribution not shrunk": ("q[len(tokens)] = q_j", "q[len(tokens)] = q_level[node]"),
    "draft distribution not normalised": ("q_j = q_j / q_j.sum()", "pass"),
    "last token from p after rejections": ("torch.multinomial(r_j, 1)", "torch.multinomial(p[node], 1)"),
    "all candidates verified at every node": ("if parents[candidate] != node:", "if False:"),
    "p of the parent": ("node, r_j = candidate, p[candidate]", "node, r_j = candidate, p[node]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_exact_test_rejects_faults(fault: str) -> None:
    assert distance(load(*FAULTS[fault]), (2, 1)) > 1e-3


def tiny_llama(output_scale: float = 1.0) -> PreTrainedModel:
    """A random Llama with layers eight times as strong as at initialization, so that attention decides its output."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=None))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers" in name and weight.dim() > 1:
                weight *= 8
        model.lm_head.weight *= 20 * output_scale
    return model.eval()


PROMPT = [5, 17, 3, 60]
PARENTS = [0, 0, 1, 2, 3, 3, 4, 4, 5, 5]  # the prompt, two candidates, two for each of them


def test_a_step_scores_its_tree_in_one_forward_of_the_target() -> None:
    module, calls = load(), []
    forward = module.forward
    module.forward = lambda model, tokens, parents: calls.append((model, parents[:])) or forward(model, tokens, parents)
    target, draft = tiny_llama(), tiny_llama()
    module.speculative_step(target, draft, PROMPT, (2, 2))
    assert calls == [(draft, PARENTS[:4]), (draft, PARENTS[:6]), (target, PARENTS)]


def test_tree_attention() -> None:
    """Every node has the distribution that its path has alone; with siblings in sight it would have another."""
    module, model = load(), tiny_llama()
    tokens = [*PROMPT, 8, 9, 10, 11, 12, 13]
    paths = [[4], [5], [4, 6], [4, 7], [5, 8], [5, 9]]
    tree = module.forward(model, tokens, PARENTS)
    chain = module.forward(model, tokens, [0, *range(len(tokens) - 1)])
    for path in paths:
        with torch.no_grad():
            alone = model(torch.tensor([PROMPT + [tokens[node] for node in path]])).logits[0, -1].softmax(-1)
        torch.testing.assert_close(tree[path[-1]], alone, rtol=1e-3, atol=1e-5)
        if path != [4]:  # the first candidate sees no sibling in a chain either
            assert (chain[path[-1]] - alone).abs().sum() > 0.1


def test_a_sharp_target_gives_its_greedy_text() -> None:
    module, target = load(), tiny_llama(output_scale=1000)
    draft = tiny_llama()
    new, steps = module.generate(target, draft, PROMPT, 12, (3, 2))
    ids = torch.tensor([PROMPT])
    greedy = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert new == greedy[0, len(PROMPT) :].tolist()
    assert steps < 12


def test_it_runs() -> None:
    """As a script, without mcsd."""
    assert "mcsd" not in FILE.read_text()
    run = subprocess.run([sys.executable, FILE], capture_output=True, text=True, check=True, timeout=300)
    tokens, summary = run.stdout.splitlines()
    assert len(tokens.split()) == 64
    steps = int(summary.removeprefix("64 tokens in ").removesuffix(" forwards of the target"))
    assert 64 / 4 <= steps < 64
