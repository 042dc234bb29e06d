"""Prompts that begin like earlier texts: what is not read again, and that the output is the one of a fresh engine."""

from typing import Any

import pytest
import torch

import mcsd
from mcsd import SamplingParams
from mcsd.drafters import Drafter, HeadDrafter, ModelDrafter
from mcsd.errors import NonFiniteLogits
from mcsd.models import TransformersModel
from mcsd.models.prefill import prefill
from mcsd.testing import TabularModel
from support.exact import CONTEXT, POISON, exact, exact_head, plain, poisoned, random_tokens

SLOTS = CONTEXT + 32 + 2
TREE = "2x2x1"
SEEDED = SamplingParams(seed=5, max_new_tokens=6)
GREEDY = SamplingParams(temperature=0, max_new_tokens=6)


@pytest.fixture(autouse=True)
def block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcsd.models.prefix_cache.BLOCK", 4)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens the target reads for each prompt."""
    counts: list[int] = []

    def counted(model: Any, cache: Any, sequence: int, tokens: list[int], *rest: Any) -> Any:
        counts.append(len(tokens))
        return prefill(model, cache, sequence, tokens, *rest)

    monkeypatch.setattr("mcsd.core.prefill", counted)
    return counts


def drafter(kind: str) -> Drafter | str:
    if kind == "head":
        return HeadDrafter(exact_head("llama"), 3, SLOTS)
    if kind == "model":
        return ModelDrafter(TransformersModel(exact("mistral-window", 1)), 96, 3, SLOTS)
    return kind


def engine(kind: str, tree: str = TREE, **options: Any) -> mcsd.Engine:
    draft = "ngram" if tree == "none" else drafter(kind)
    options = {"max_batch": 3, "max_length": CONTEXT, **options}
    return mcsd.Engine(TransformersModel(exact("llama")), draft, tree=tree, scheme="mcss-wor", **options)


KINDS = ["model", "head", "ngram"]


@pytest.mark.parametrize("params", [SEEDED, GREEDY], ids=["seeded", "greedy"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_turns_of_a_conversation_are_read_once(kind: str, params: SamplingParams, read: list[int]) -> None:
    one = engine(kind)
    text = random_tokens(0, 10)
    for turn in range(3):
        done = one.generate(text, params)
        fresh = engine(kind, prefix_cache=0).generate(text, params)
        assert done.token_ids == fresh.token_ids
        assert done.stats.acceptance_histogram == fresh.stats.acceptance_histogram
        assert fresh.stats.cached_tokens == 0
        assert read == [len(text) - 1 - done.stats.cached_tokens, len(text) - 1]
        if turn:
            # All but what the last step emitted, of which the head has no hidden states, and the new tokens.
            assert read[0] <= 4 + 4
        read.clear()
        text = [*text, *done.token_ids, *random_tokens(turn + 1, 4)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_equal_prompt_is_not_read_at_all(kind: str, read: list[int]) -> None:
    one = engine(kind)
    text = random_tokens(0, 20)
    first, second = (one.generate(text, SEEDED) for _ in range(2))
    assert read == [19, 0]
    assert first.token_ids == second.token_ids
    assert [first.stats.cached_tokens, second.stats.cached_tokens] == [0, 19]


@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_log_probabilities_are_those_of_the_model(kind: str) -> None:
    """Of every token after copied, read and generated ones, within the rounding of float64."""
    one = engine(kind, tree="none" if kind == "none" else TREE)
    texts = [random_tokens(0, 25)]
    texts += [[*texts[0][:length], *random_tokens(length, 30 - length)] for length in (5, 12, 16, 25)]
    network = exact("llama")
    for text in [*texts, *reversed(texts)]:
        done = one.generate(text, SamplingParams(seed=1, max_new_tokens=8, logprobs=20))
        whole = [*text, *done.token_ids]
        expected = plain(network, [whole])[0][0].log_softmax(-1)
        assert done.logprobs is not None
        for row, each in zip(expected[len(text) - 1 :], done.logprobs, strict=False):
            tokens, values = zip(*each.top, strict=True)
            # They are reported in float32.
            torch.testing.assert_close(torch.tensor(values), row[list(tokens)].float(), atol=1e-5, rtol=1e-5)
    assert done.stats.cached_tokens == 24


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_one_call_share_a_beginning(kind: str, read: list[int]) -> None:
    system = random_tokens(0, 14)
    prompts = [[*system, *random_tokens(seed, 6)] for seed in range(1, 6)]
    params = [SamplingParams(seed=seed, max_new_tokens=5 + seed) for seed in range(5)]
    together = engine(kind).generate(prompts, params)
    # The last two of five are admitted later, when the first texts are kept.
    assert read[:3] == [19, 5, 5]
    assert max(read[3:]) <= 6
    for prompt, each, done in zip(prompts, params, together, strict=True):
        assert done.token_ids == engine(kind, prefix_cache=0).generate(prompt, each).token_ids


@pytest.mark.parametrize("kind", ["model", "head"])
def test_the_draft_does_not_read_a_kept_text_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine(kind)
    text = random_tokens(0, 20)
    done = one.generate(text, SEEDED)
    read: list[int] = []
    whole: Any = one.drafter
    forward = whole.model.forward

    def counted(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        read.append(tokens.shape[1])
        return forward(tokens, *args, **kwargs)

    monkeypatch.setattr(whole.model, "forward", counted)
    one.generate([*text, *done.token_ids, 1, 2, 3], SamplingParams(seed=1, max_new_tokens=1))
    # What the last step emitted, the three new tokens, and the levels of the tree.
    assert sum(read) <= 4 + 3 + 2 + 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_text_is_not_kept_and_spoils_none(kind: str) -> None:
    network = exact("llama")
    with poisoned(network, POISON):
        one = engine(kind)
        beginning = random_tokens(0, 12)
        for _ in range(2):
            with pytest.raises(NonFiniteLogits):
                one.generate([*beginning, POISON, *random_tokens(1, 8)], SEEDED)
            assert one.prefixes.stats.texts == 0
        expected = engine(kind, prefix_cache=0).generate(beginning, SEEDED)
        for _ in range(2):
            assert one.generate(beginning, SEEDED).token_ids == expected.token_ids


def test_a_text_that_fails_after_its_end_is_not_kept() -> None:
    """The last token is an accepted candidate that ends the text; after it the target gives no distribution."""
    table = torch.eye(6, dtype=torch.float64).roll(1, dims=1)
    target = TabularModel(table)
    target.eos_token_ids = frozenset({5})
    target._logits[5] = torch.nan
    one = mcsd.Engine(target, TabularModel(table), tree="chain:2", max_length=CONTEXT)
    for prompt, accepted, kept in (([0, 1, 2, 3, 4], 1, 0), ([0, 1, 2, 3], 2, 0), ([0, 1, 2, 3, 2], 2, 1)):
        done = one.generate(prompt, temperature=0, max_new_tokens=5)
        assert done.finish_reason == "stop"
        assert done.token_ids[-1] == 5
        assert done.stats.accepted_tokens == accepted
        assert one.prefixes.stats.texts == kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_cancelled_text_is_kept_as_far_as_it_was_read(kind: str, read: list[int]) -> None:
    one = engine(kind)
    text = random_tokens(0, 20)
    stream = one.stream(text, SamplingParams(seed=1, max_new_tokens=15))
    seen = [token for _ in range(3) for token in next(stream).token_ids]
    stream.close()
    continued = [*text, *seen, *random_tokens(2, 3)]
    done = one.generate(continued, SEEDED)
    assert done.token_ids == engine(kind, prefix_cache=0).generate(continued, SEEDED).token_ids
    assert done.stats.cached_tokens >= len(text)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_step_keeps_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine(kind)
    commit = one.drafter.commit
    monkeypatch.setattr(one.drafter, "commit", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    text = random_tokens(0, 20)
    with pytest.raises(KeyboardInterrupt):
        one.generate(text, SEEDED)
    monkeypatch.setattr(one.drafter, "commit", commit)
    assert one.prefixes.stats.texts == 0
    assert one.generate(text, SEEDED).token_ids == engine(kind).generate(text, SEEDED).token_ids


def test_the_option_is_checked_and_limits_the_texts() -> None:
    with pytest.raises(mcsd.errors.InvalidOption, match="prefix_cache"):
        engine("ngram", prefix_cache=-1)
    one = engine("model", prefix_cache=2)
    for seed in range(5):
        one.generate(random_tokens(seed, 12), GREEDY)
    assert one.prefixes.stats.texts == one.prefixes.stats.max_texts == 2
    off = engine("model", prefix_cache=0)
    off.generate(random_tokens(0, 12), GREEDY)
    assert off.prefixes.stats.texts == 0
