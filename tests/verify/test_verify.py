"""`mcsd.verify` passes correct engines with every scheme, and fails broken ones in each of its checks.

False alarms: seeds are fixed, so each test passes always or never. A correct engine fails the sampled part with one
seed in a thousand.

Power: the broken engines below are off by more than 0.1 in total variation, where 0.07 would be detected.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import mcsd
from mcsd.cpu.weight_plan import has_bf16_gemm
from mcsd.errors import EmptyPrompt, InvalidOption, InvalidParameter, PromptTooLong
from mcsd.models import ModelOutput, TokenLayout, TransformersModel
from mcsd.rng import Randomness
from mcsd.schemes.recursive import McssWithoutReplacement
from mcsd.schemes.registry import REGISTRY
from mcsd.schemes.types import Node
from mcsd.testing import TabularModel
from mcsd.verify import VerificationReport, VerifyOptions, verify

VOCABULARY = 12
# A prompt of one token needs no prefill, which would take most of the time.
PROMPTS: list[Any] = [[1], [4], [5], [2]]
GREEDY_LENGTH = mcsd.SamplingParams(max_new_tokens=12)


def network(seed: int) -> Any:
    """A random Llama with several probable tokens everywhere; other seeds add a little noise."""
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


def check(subject: mcsd.Engine, samples: int = 2000, params: mcsd.SamplingParams = GREEDY_LENGTH) -> VerificationReport:
    return verify(subject, PROMPTS, params, VerifyOptions(contexts=4, samples=samples))


def tree_of(scheme: str) -> str:
    return {1: "chain:3", 2: "2x2"}.get(REGISTRY[scheme].max_width or 0, "3x2")


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
def test_the_distribution_follows_the_sampling_parameters(params: mcsd.SamplingParams) -> None:
    report = check(engine(), samples=500, params=params)
    assert report.passed, report
    assert sum(one.forbidden for one in report.sampled.contexts) == 0


class Broken(McssWithoutReplacement):
    """Verifies with half of the q that it drew from, and so accepts too often."""

    def verify_node(self, node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
        weaker = type(node.q)(node.q.support, node.q.weights * 0.5)
        return super().verify_node(replace(node, q=weaker), random)


class Credulous(McssWithoutReplacement):
    """Accepts the first candidate now and then, probable or not: at temperature 0, and with probability 0."""

    def verify(self, tree: Any, logits: Tensor, *rest: Any) -> Any:
        logits = logits.clone()
        logits[::7, 0].scatter_(1, tree.tokens[::7, :1], 30.0)
        return super().verify(tree, logits, *rest)


class Misplaced(TransformersModel):
    """The position ids of a tree's candidates are too large by one."""

    def forward(self, tokens: Tensor, block: TokenLayout, *rest: Any, **named: Any) -> ModelOutput:
        return super().forward(tokens, TokenLayout(block.offsets + (block.offsets > 0), block.mask), *rest, **named)


def scheme_that(kind: Callable[[], Any]) -> mcsd.Engine:
    subject = engine()
    subject._scheme = kind()
    return subject


def test_biased_verification_fails_the_samples_only() -> None:
    report = check(scheme_that(Broken))
    assert report.greedy.passed
    assert not report.sampled.passed
    assert not report.passed
    assert report.sampled.rejected == (True,) * 5
    for one in report.sampled.contexts:
        assert one.total_variation > one.plain[2]


def test_tokens_of_probability_zero_fail_both_parts() -> None:
    params = mcsd.SamplingParams(top_k=3, max_new_tokens=12)
    report = check(scheme_that(Credulous), params=params)
    assert not report.greedy.passed
    assert not report.sampled.passed
    assert sum(one.forbidden for one in report.sampled.contexts) > 20


def test_wrong_positions_fail_both_parts_and_do_not_count_as_rounding() -> None:
    report = check(engine(Misplaced(network(0)), tree="3x3"))
    assert not report.greedy.passed
    assert report.greedy.rounding < 1e-4
    assert not report.sampled.passed
    assert max(one.rounding for one in report.sampled.contexts) < 1e-5


def test_a_stale_cache_fails_greedy_texts() -> None:
    subject = engine(tree="3x2")
    subject.cache._keep = lambda columns, counts, sequences: None  # type: ignore[method-assign]
    report = check(subject, samples=500)
    assert not report.greedy.passed
    worst = max(one.gap for one in report.greedy.failures)
    assert worst > 100 * report.greedy.rounding


@pytest.mark.skipif(not has_bf16_gemm(torch.device("cpu")), reason="this CPU computes bfloat16 by way of float32")
def test_in_bfloat16_rounding_is_measured_and_allowed_for() -> None:
    options = VerifyOptions(contexts=2, samples=500)
    report = verify(engine(network(0).bfloat16()), [[1, 2, 3, 4, 5, 6, 7], [4, 8, 9, 1, 2]], GREEDY_LENGTH, options)
    assert report.passed, report
    assert report.dtype == "bfloat16"
    assert 1e-3 < report.greedy.rounding < 0.3
    assert max(one.rounding for one in report.sampled.contexts) > 1e-4


def test_prompts_are_continued_to_further_contexts() -> None:
    subject = engine()
    report = verify(
        subject, [[1, 2, 3], [4]], mcsd.SamplingParams(max_new_tokens=6), VerifyOptions(contexts=4, samples=500)
    )
    seen = [(one.prompt, one.continued, one.tokens) for one in report.sampled.contexts]
    assert seen == [(0, 0, 3), (1, 0, 1), (0, 5, 8), (1, 5, 6)]


def test_a_short_time_limit_checks_less_and_reports_it() -> None:
    prompts: list[Any] = [[i % 12] for i in range(40)]
    begun = time.monotonic()
    report = verify(engine(), prompts, GREEDY_LENGTH, VerifyOptions(contexts=40, samples=100_000, minutes=0.05))
    # Three seconds on an idle machine. The number of samples depends on the clock.
    assert time.monotonic() - begun < 90
    assert report.greedy.passed, report
    assert 8 <= report.greedy.texts <= report.greedy.asked == 40
    assert 1 <= len(report.sampled.contexts) <= report.sampled.asked == 40
    assert len({one.samples for one in report.sampled.contexts}) == 1
    assert 500 <= report.sampled.contexts[0].samples < report.sampled.asked_samples
    least = verify(engine(), prompts, GREEDY_LENGTH, VerifyOptions(contexts=40, samples=100_000, minutes=1e-6))
    assert (least.greedy.texts, len(least.sampled.contexts)) == (8, 1)
    assert 500 <= least.sampled.contexts[0].samples < 1000


def test_the_same_seed_gives_the_same_result() -> None:
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
        VerifyOptions(**{name: value})  # type: ignore[arg-type]


def test_bad_input() -> None:
    with pytest.raises(InvalidParameter, match="temperature=0"):
        verify(engine(), PROMPTS, mcsd.SamplingParams(temperature=0))
    with pytest.raises(EmptyPrompt, match="no tokenizer"):
        verify(engine())
    with pytest.raises(EmptyPrompt, match="empty"):
        verify(engine(), [])
    with pytest.raises(PromptTooLong, match="no prompt leaves space"):
        verify(engine(), [[1] * 31], GREEDY_LENGTH, VerifyOptions(samples=500))
