"""Exact laws of the whole engine over several steps: caches, masks, positions, commits and ends of texts included.

The target is a tiny network in float64, the draft another one or a head, and every outcome of every random decision of
whole texts is enumerated (see `support.enumeration`). The expected law comes from transformers alone, and the two agree
to 1e-12. Faults in caches show only from the second step on, so texts are longer than the output of one step.
"""

from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import mcsd
import mcsd.core
from mcsd import kernels
from mcsd.cpu.native_decoder import NativeDecoder
from mcsd.kernels.gemm import WeightFormat
from mcsd.models import BoundHead, DraftHead, TokenLayout, TransformersModel
from mcsd.models.draft_head import HeadConfig
from mcsd.models.fusion import fuse
from mcsd.models.llama import LlamaConfig
from mcsd.models.prefix_cache import BLOCK
from support.chisquare import SEED, runnable
from support.decoders import native_decoder
from support.enumeration import Decisions, Enumerated, enumerate_all

PROMPT = [0, 1]
"""Long enough for a prefill, which is shared by all texts that begin with it."""

TOLERANCE = 1e-12
Law = dict[tuple[int, ...], float]


def network(vocabulary: int, seed: int, eos: int | None = None) -> transformers.PreTrainedModel:
    """A random Llama in float64 whose distributions are neither uniform nor nearly one-hot."""
    torch.manual_seed(100 * SEED + seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).double()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.5)
    model.lm_head.weight.data *= 0.4
    return model


def head(target: TransformersModel, kind: str = "mcsd") -> BoundHead:
    """A random head. The vocabulary of one of EAGLE-3 lacks the first token, of one of mcsd the last."""
    torch.manual_seed(100 * SEED + 50)
    size = target.vocab_size
    known = torch.arange(size) if kind == "eagle" else torch.arange(size - 1) + (kind == "eagle3")
    layers = {"mcsd": (1, -1), "eagle": (-1,), "eagle3": (0, 1)}[kind]
    fields: dict[str, Any] = {}
    if kind != "mcsd":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 64}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        fields = {"kind": kind, "layer": LlamaConfig(vocab_size=size, **sizes, **heads)}
    draft = DraftHead(HeadConfig("random", size, 16, layers, num_layers=1, vocab_size=len(known), **fields))
    draft.vocabulary.copy_(known)
    for parameter in draft.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.5)
    return BoundHead(draft, target, "head")


def engine_law(
    engine: mcsd.Engine,
    params: mcsd.SamplingParams,
    monkeypatch: pytest.MonkeyPatch,
    others: Sequence[mcsd.SamplingParams] = (),
) -> Law:
    """The law of the texts that an engine gives after `PROMPT`, beside requests with the parameters ``others``."""

    def run(decisions: Decisions, start: Tensor) -> list[list[int]]:
        def streams(seeds: Tensor) -> SimpleNamespace:
            return SimpleNamespace(at=lambda positions, stream, on_device: Enumerated(decisions, seeds))

        monkeypatch.setattr(mcsd.core, "PhiloxStreams", streams)
        each = [replace(one, seed=i) for i, one in enumerate([params] * len(start) + list(others))]
        return [list(done.token_ids) for done in engine.generate([PROMPT] * len(each), each)[: len(start)]]

    law: Law = defaultdict(float)
    for _, texts, chances in enumerate_all(1, run):
        for text, chance in zip(texts, chances.tolist(), strict=True):
            law[tuple(text)] += chance
    return law


def target_law(model: transformers.PreTrainedModel, length: int, temperature: float, eos: int | None = None) -> Law:
    """The target's own probability of every text, from transformers alone."""
    size = model.config.vocab_size
    ids = torch.tensor([[*PROMPT, *text] for text in product(range(size), repeat=length)])
    with torch.no_grad():
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits
    steps = (logits[:, len(PROMPT) - 1 : -1] / temperature).softmax(-1).gather(2, ids[:, len(PROMPT) :, None])[..., 0]
    law: Law = {}
    for text, chances in zip(ids[:, len(PROMPT) :].tolist(), steps, strict=True):
        end = text.index(eos) + 1 if eos in text else length
        law[tuple(text[:end])] = float(chances[:end].prod())
    return law


def as_network(model: NativeDecoder) -> Any:
    """A native decoder, called as `target_law` calls a network: whole texts, without a tree."""

    def network(ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        cache = model.new_cache(*ids.shape)
        for _ in ids:
            cache.add()
        return SimpleNamespace(logits=model.forward(ids, TokenLayout.chain(ids.shape[1]), cache).logits.double())

    network.config = SimpleNamespace(vocab_size=model.vocab_size)  # type: ignore[attr-defined]
    return network


def check(found: Law, expected: Law, tolerance: float = TOLERANCE, of_sum: float = TOLERANCE) -> None:
    assert sum(found.values()) == pytest.approx(1.0, abs=of_sum)
    assert set(found) == set(expected)
    assert max(abs(found[text] - expected[text]) for text in expected) <= tolerance


@pytest.mark.parametrize(("scheme", "tree"), runnable("2", "chain:2", "2x1"))
def test_law_of_texts(scheme: str, tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size, length = (2 if tree == "2x1" else 3), 3
    target = network(size, 1)
    engine = mcsd.Engine(target, network(size, 2), tree=tree, scheme=scheme, max_batch=512, max_length=16)
    params = mcsd.SamplingParams(temperature=0.8, max_new_tokens=length)
    check(engine_law(engine, params, monkeypatch), target_law(target, length, 0.8))


@pytest.mark.parametrize(("scheme", "tree"), [("mcss-wor", "2x1"), ("block", "chain:2")])
def test_law_of_texts_of_fused_layers(scheme: str, tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an engine that has loaded a model by name."""
    target, draft = network(2, 1), network(2, 2)
    expected = target_law(target, 3, 0.8)
    fuse(target)
    fuse(draft)
    engine = mcsd.Engine(target, draft, tree=tree, scheme=scheme, max_batch=512, max_length=16)
    # The norms of transformers are in float32 even here.
    check(engine_law(engine, mcsd.SamplingParams(temperature=0.8, max_new_tokens=3), monkeypatch), expected, 1e-6)


@pytest.mark.skipif(not kernels.available(), reason="no kernels for this CPU")
@pytest.mark.parametrize("kind", [WeightFormat.BFP16, WeightFormat.W4A8])
@pytest.mark.parametrize(("scheme", "tree"), [("mcss-wor", "2x1"), ("block", "chain:2")])
def test_law_of_texts_of_layers_in_our_kernels(
    scheme: str, tree: str, kind: WeightFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target's law is that of its layers as they run, which is near that of transformers' own in float64."""
    target, draft = (network(2, seed).bfloat16() for seed in (1, 2))
    exact = target_law(deepcopy(target).double(), 3, 0.8)
    models = native_decoder(target.float()), native_decoder(draft.float(), kind)
    # Hundreds of rows go through all layers at once too, as a few do; so does a vocabulary of two.
    monkeypatch.setattr("mcsd.cpu.native_layers.MAX_FUSED_TOKENS", 1 << 20)
    monkeypatch.setattr("mcsd.kernels.distributions.LARGE_VOCABULARY", 2)
    engine = mcsd.Engine(*models, tree=tree, scheme=scheme, max_batch=512, max_length=16)
    found = engine_law(engine, mcsd.SamplingParams(temperature=0.8, max_new_tokens=3), monkeypatch)
    # Attention in float32 is rounded otherwise for one text than in a tree, which may bring a state to its next step.
    check(found, target_law(as_network(models[0]), 3, 0.8), 1e-4, 1e-6)
    # States and weights are rounded by some 1e-4.
    check(found, exact, 1e-3, 1e-6)


@pytest.mark.parametrize(("scheme", "tree"), [("mcss-wor", "2x1"), ("block", "chain:2"), ("traversal", "2x1")])
def test_law_of_texts_with_penalties(scheme: str, tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Penalties depend on the text, so at a node they count the candidates on its path."""
    target = network(2, 6)
    engine = mcsd.Engine(target, network(2, 7), tree=tree, scheme=scheme, max_batch=512, max_length=16)
    params = mcsd.SamplingParams(
        max_new_tokens=3, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4, logit_bias={0: 0.3}
    )
    expected: Law = {}
    for text in product(range(2), repeat=3):
        chance = 1.0
        for i, token in enumerate(text):
            before = [*PROMPT, *text[:i]]
            with torch.no_grad():
                scores = target(torch.tensor([before])).logits[0, -1]
            for known in set(before):
                scores[known] = scores[known] / 1.3 if scores[known] > 0 else scores[known] * 1.3
            for known in range(2):
                scores[known] -= 0.5 * (known in text[:i]) + 0.4 * text[:i].count(known)
            scores[0] += 0.3
            chance *= float(scores.softmax(-1)[token])
        expected[text] = chance
    check(engine_law(engine, params, monkeypatch), expected)


def favour_repeated_parity(input_ids: Tensor, logits: Tensor) -> Tensor:
    """A user's processor: the logit of token 1 depends on all tokens so far."""
    logits = logits.clone()
    logits[:, 1] += 0.7 * (-1) ** int(input_ids.sum())
    return logits


@pytest.mark.parametrize(("scheme", "tree"), [("mcss-wor", "2x1"), ("block", "chain:2"), ("traversal", "2x1")])
@pytest.mark.parametrize("kind", ["processor", "bad words", "minimal length", "typical"])
def test_law_of_texts_with_processors(scheme: str, tree: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The expected distribution applies the processors of transformers to the logits after every text."""
    eos = 1
    target = network(2, 6, eos)
    fields, processors = {
        "processor": ({"logits_processors": [favour_repeated_parity]}, [favour_repeated_parity]),
        "bad words": ({"bad_words": [[0, 0, 0]]}, [transformers.NoBadWordsLogitsProcessor([[0, 0, 0]], [eos])]),
        "minimal length": (
            {"min_new_tokens": 2},
            [transformers.MinNewTokensLengthLogitsProcessor(len(PROMPT), 2, [eos])],
        ),
        "typical": ({"typical_p": 0.55}, [transformers.TypicalLogitsWarper(0.55)]),
    }[kind]
    engine = mcsd.Engine(target, network(2, 7), tree=tree, scheme=scheme, max_batch=512, max_length=16)
    expected: Law = defaultdict(float)
    for text in product(range(2), repeat=3):
        end = text.index(eos) + 1 if eos in text else 3
        chance = 1.0
        for i, token in enumerate(text[:end]):
            before = torch.tensor([[*PROMPT, *text[:i]]])
            with torch.no_grad():
                scores = target(before).logits[:, -1]
            for processor in processors:
                scores = processor(before, scores)
            chance *= float(scores.softmax(-1)[0, token])
        expected[text[:end]] = chance
    found = engine_law(engine, mcsd.SamplingParams(max_new_tokens=3, **fields), monkeypatch)  # type: ignore[arg-type]
    check(found, {text: chance for text, chance in expected.items() if chance})


@pytest.mark.parametrize(
    ("scheme", "kind"),
    # A head that proposes all tokens has many more outcomes.
    [
        ("mcss-wor", "mcsd"),
        ("traversal", "mcsd"),
        ("mcss-wor", "eagle3"),
        ("traversal", "eagle3"),
        ("traversal", "eagle"),
    ],
)
def test_law_of_texts_with_a_head(scheme: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = TransformersModel(network(3, 3))
    engine = mcsd.Engine(target, head(target, kind), tree="2x1", scheme=scheme, max_batch=512, max_length=16)
    params = mcsd.SamplingParams(max_new_tokens=3)
    check(engine_law(engine, params, monkeypatch), target_law(target.network, 3, 1.0))


@pytest.mark.parametrize(("scheme", "tree"), [("mcss-wor", "2x1"), ("block", "chain:2"), ("traversal", "2x1")])
def test_law_of_texts_that_end_with_eos(scheme: str, tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end-of-sequence token may be drafted, accepted inside a path, or drawn by the target."""
    target = network(2, 4, eos=1)
    engine = mcsd.Engine(target, network(2, 5), tree=tree, scheme=scheme, max_batch=512, max_length=16)
    params = mcsd.SamplingParams(max_new_tokens=3)
    check(engine_law(engine, params, monkeypatch), target_law(target, 3, 1.0, eos=1))


@pytest.mark.parametrize("common", [1, BLOCK])
def test_prompts_with_a_common_prefix_are_kept_apart(common: int) -> None:
    """What prompts have in common is copied from a whole block on; others must not be: compares log-probabilities."""
    target = network(3, 8)
    prompts = [[*[0, 2] * (common // 2), *[0] * (common % 2), *rest, 1] for rest in product(range(3), repeat=2)]
    prompts = [*prompts, *prompts[::2]]
    engine = mcsd.Engine(target, network(3, 9), tree="2x1", max_batch=len(prompts), max_length=common + 15)
    params = [mcsd.SamplingParams(max_new_tokens=4, seed=i, logprobs=0) for i in range(len(prompts))]
    for prompt, done in zip(prompts, engine.generate(prompts, params), strict=True):
        ids = torch.tensor([[*prompt, *done.token_ids]])
        with torch.no_grad():
            law = target(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = law.gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert done.logprobs is not None
        found = torch.tensor([entry.logprob for entry in done.logprobs], dtype=torch.float64)
        # Log-probabilities are computed in float32 or better.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
