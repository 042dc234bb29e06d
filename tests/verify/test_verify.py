"""`mcsd.verify` passes what is right, scheme by scheme, and fails what is not, in each way that it looks.

Odds. Seeds are fixed, so each test passes always or never. A right engine fails the sampled part on one seed in a
thousand, so a test that expects it to pass was made with an even smaller chance of having to look for a seed.

Power. The broken engines below are wrong by more than 0.1 in total variation, where 0.07 would be found.
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import mcsd
from mcsd.errors import EmptyPrompt, InvalidOption, InvalidParameter, PromptTooLong
from mcsd.models import Block, Output, TransformersModel
from mcsd.rng import Randomness
from mcsd.schemes.candidates import Node
from mcsd.schemes.recursive import McssWithoutReplacement
from mcsd.testing import TabularModel
from mcsd.verify import Options, Report, verify

VOCABULARY = 12
# A prompt of one token needs no prefill, which would take most of the time.
PROMPTS: list[Any] = [[1], [4], [5], [2]]
GREEDY_LENGTH = mcsd.SamplingParams(max_new_tokens=12)


def network(seed: int) -> Any:
    """A random Llama with several likely tokens everywhere; seeds differ by a little noise."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    plain = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes, **plain))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.5)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * seed * torch.randn(parameter.shape, generator=generator)
    model.lm_head.weight.data *= 0.7
    return model


def engine(target: Any = None, scheme: str = "mcss-wor", tree: str = "2x2") -> mcsd.Engine:
    return mcsd.Engine(target or network(0), network(1), tree=tree, scheme=scheme, max_batch=256, max_length=32)


def tables() -> tuple[TabularModel, TabularModel]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.rand(2, VOCABULARY, VOCABULARY, generator=generator) ** 2 + 0.01
    target, draft = rows / rows.sum(-1, keepdim=True)
    return TabularModel(target), TabularModel(draft)


def check(subject: mcsd.Engine, samples: int = 2000, params: mcsd.SamplingParams = GREEDY_LENGTH) -> Report:
    return verify(subject, PROMPTS, params, Options(contexts=4, samples=samples))


def tree_of(scheme: str) -> str:
    return {1: "chain:3", 2: "2x2"}.get(mcsd.SCHEMES[scheme].widest or 0, "3x2")


@pytest.mark.parametrize("scheme", sorted(mcsd.SCHEMES))
def test_every_scheme_passes_on_a_network(scheme: str) -> None:
    report = check(engine(scheme=scheme, tree=tree_of(scheme)), samples=500)
    assert report.passed, report
    assert (report.scheme, report.tree, report.dtype) == (scheme, tree_of(scheme), "float32")
    assert report.greedy.texts == len(PROMPTS)
    assert report.greedy.tokens == 12 * len(PROMPTS)
    assert 0 < report.greedy.rounding < 1e-4
    assert [one.samples for one in report.sampled.contexts] == [500] * 4
    assert all(one.cells > 4 and one.rounding < 1e-5 for one in report.sampled.contexts)
    assert report.sampled.sees is not None
    assert report.sampled.sees < 0.15


@pytest.mark.parametrize("scheme", sorted(mcsd.SCHEMES))
def test_every_scheme_passes_on_tables(scheme: str) -> None:
    target, draft = tables()
    subject = mcsd.Engine(target, draft, tree=tree_of(scheme), scheme=scheme, max_batch=512, max_length=32)
    report = check(subject, samples=500)
    assert report.passed, report
    assert report.greedy.divergences == ()


@pytest.mark.parametrize(
    "params",
    [
        mcsd.SamplingParams(temperature=0.6, top_k=5, max_new_tokens=4),
        mcsd.SamplingParams(top_p=0.8, min_p=0.02, max_new_tokens=4),
        mcsd.SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5, logit_bias={3: 2.0}, max_new_tokens=4),
    ],
    ids=["T-k", "p-min", "penalties"],
)
def test_the_law_is_the_one_that_was_asked_for(params: mcsd.SamplingParams) -> None:
    report = check(engine(), samples=500, params=params)
    assert report.passed, report
    assert sum(one.forbidden for one in report.sampled.contexts) == 0


class Broken(McssWithoutReplacement):
    """Judges by half of the q that it drew from, so that it accepts too often."""

    def judge_node(self, node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
        weaker = type(node.q)(node.q.support, node.q.weights * 0.5)
        return super().judge_node(
            Node(node.p, node.tokens, node.valid, node.count, node.choice, weaker, node.rows), random
        )


class Credulous(McssWithoutReplacement):
    """Takes the first candidate now and then, likely or not: at temperature 0, and where the law forbids it."""

    def judge(self, tree: Any, logits: Tensor, *rest: Any) -> Any:
        logits = logits.clone()
        logits[::7, 0].scatter_(1, tree.tokens[::7, :1], 30.0)
        return super().judge(tree, logits, *rest)


class Misplaced(TransformersModel):
    """A tree's candidates stand one position too far."""

    def forward(self, tokens: Tensor, block: Block, *rest: Any, **named: Any) -> Output:
        return super().forward(tokens, Block(block.offsets + (block.offsets > 0), block.mask), *rest, **named)


def scheme_that(kind: Callable[[], Any]) -> mcsd.Engine:
    subject = engine()
    subject._scheme = kind()
    return subject


def test_a_biased_judgement_fails_the_samples_and_only_those() -> None:
    report = check(scheme_that(Broken))
    assert report.greedy.passed
    assert not report.sampled.passed
    assert not report.passed
    assert report.sampled.rejected == (True,) * 5
    for one in report.sampled.contexts:
        assert one.total_variation > one.plain[2]


def test_tokens_that_the_law_forbids_fail_both() -> None:
    params = mcsd.SamplingParams(top_k=3, max_new_tokens=12)
    report = check(scheme_that(Credulous), params=params)
    assert not report.greedy.passed
    assert not report.sampled.passed
    assert sum(one.forbidden for one in report.sampled.contexts) > 20


def test_wrong_positions_fail_both_and_do_not_pass_for_rounding() -> None:
    report = check(engine(Misplaced(network(0)), tree="3x3"))
    assert not report.greedy.passed
    assert report.greedy.rounding < 1e-4
    assert not report.sampled.passed
    assert max(one.rounding for one in report.sampled.contexts) < 1e-5


def test_a_stale_cache_fails_greedy_texts() -> None:
    subject = engine(tree="3x2")
    subject._cache._keep = lambda columns, counts, rows: None  # type: ignore[method-assign]
    report = check(subject, samples=500)
    assert not report.greedy.passed
    worst = max(one.gap for one in report.greedy.failures)
    assert worst > 100 * report.greedy.rounding


def test_in_bfloat16_rounding_is_measured_and_allowed_for() -> None:
    options = Options(contexts=2, samples=500)
    report = verify(engine(network(0).bfloat16()), [[1, 2, 3, 4, 5, 6, 7], [4, 8, 9, 1, 2]], GREEDY_LENGTH, options)
    assert report.passed, report
    assert report.dtype == "bfloat16"
    assert 1e-3 < report.greedy.rounding < 0.3
    assert max(one.rounding for one in report.sampled.contexts) > 1e-4


def test_contexts_go_on_where_prompts_end() -> None:
    subject = engine()
    report = verify(subject, [[1, 2, 3], [4]], mcsd.SamplingParams(max_new_tokens=6), Options(contexts=4, samples=500))
    seen = [(one.prompt, one.continued, one.tokens) for one in report.sampled.contexts]
    assert seen == [(0, 0, 3), (1, 0, 1), (0, 5, 8), (1, 5, 6)]


def test_a_small_budget_does_less_and_says_so() -> None:
    prompts: list[Any] = [[i % 12] for i in range(40)]
    begun = time.monotonic()
    report = verify(engine(), prompts, GREEDY_LENGTH, Options(contexts=40, samples=100_000, minutes=0.05))
    # Three seconds where the machine is idle. How much was sampled is up to the clock, so the samples may be any.
    assert time.monotonic() - begun < 90
    assert report.greedy.passed, report
    assert 8 <= report.greedy.texts <= report.greedy.asked == 40
    assert 1 <= len(report.sampled.contexts) <= report.sampled.asked == 40
    assert len({one.samples for one in report.sampled.contexts}) == 1
    assert 500 <= report.sampled.contexts[0].samples < report.sampled.asked_samples
    least = verify(engine(), prompts, GREEDY_LENGTH, Options(contexts=40, samples=100_000, minutes=1e-6))
    assert (least.greedy.texts, len(least.sampled.contexts)) == (8, 1)
    assert 500 <= least.sampled.contexts[0].samples < 1000


def test_the_same_seed_finds_the_same() -> None:
    first, again = (check(engine(), samples=500).sampled for _ in range(2))
    other = check(engine(), samples=500, params=mcsd.SamplingParams(max_new_tokens=12, seed=7)).sampled
    assert first == again
    assert [one.chi_square for one in other.contexts] != [one.chi_square for one in first.contexts]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("contexts", 0),
        ("contexts", 257),
        ("contexts", 2.5),
        ("samples", 499),
        ("minutes", 0.0),
        ("minutes", float("nan")),
    ],
)
def test_options_outside_their_range(name: str, value: float) -> None:
    with pytest.raises(InvalidOption, match=f"{name}={value}"):
        Options(**{name: value})  # type: ignore[arg-type]


def test_bad_input() -> None:
    with pytest.raises(InvalidParameter, match="temperature=0"):
        verify(engine(), PROMPTS, mcsd.SamplingParams(temperature=0))
    with pytest.raises(EmptyPrompt, match="no tokenizer"):
        verify(engine())
    with pytest.raises(EmptyPrompt, match="empty"):
        verify(engine(), [])
    with pytest.raises(PromptTooLong, match="no prompt leaves room"):
        verify(engine(), [[1] * 31], GREEDY_LENGTH, Options(samples=500))
