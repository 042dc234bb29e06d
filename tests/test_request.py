"""A request ends its text at the right token and counts nothing after it."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mcsd.errors import StoppingCriterionFailed
from mcsd.params import SamplingParams
from mcsd.request import Request, token_logprobs
from mcsd.results import Chunk

EOS = 0


@pytest.fixture(scope="module")
def letters() -> Any:
    """Token 0 is the end, a special token; 1 to 26 are the letters; 27 is the word ``xyz``, 28 no character."""
    words = ["<eos>", *"abcdefghijklmnopqrstuvwxyz", "xyz", "\ufffd"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def request_for(tokenizer: Any, space: int = 100, **params: Any) -> Request:
    return Request([7, 8], SamplingParams(**params), space, tokenizer, frozenset({EOS}))


def at_least(length: int) -> Any:
    """A stopping criterion as transformers has them: a bool tensor, one entry per sequence."""
    return lambda input_ids, scores: torch.full((len(input_ids),), input_ids.shape[1] >= length)


def last_chunk(request: Request) -> Chunk:
    return request.chunks[-1]


def test_all_tokens_of_a_step_are_emitted(letters: Any) -> None:
    request = request_for(letters)
    assert request.append_tokens([1, 2, 3], 2, 5, None) is None
    assert request.append_tokens([4], 0, 5, None) is None
    assert request.tokens == [1, 2, 3, 4]
    assert request.all_tokens == [7, 8, 1, 2, 3, 4]
    assert request.prompt == [7, 8]
    assert list(request.chunks) == [Chunk("abc", (1, 2, 3), 2, ("a", "b", "c")), Chunk("d", (4,), 0, ("d",))]
    assert not request.done


@pytest.mark.parametrize(
    ("params", "space", "tokens", "emitted", "accepted", "reason", "text"),
    [
        ({}, 9, [1, 2, EOS], [1, 2, EOS], 2, "stop", "ab"),  # as the target's own token
        ({}, 9, [1, EOS, 3, 4], [1, EOS], 2, "stop", "a"),  # inside the accepted path
        ({}, 9, [EOS, 2, EOS], [EOS], 1, "stop", ""),
        ({}, 9, [EOS], [EOS], 0, "stop", ""),
        ({"ignore_eos": True}, 9, [1, EOS, 3, 4], [1, EOS, 3, 4], 3, None, "acd"),
        ({"max_new_tokens": 2}, 9, [1, 2, 3, 4], [1, 2], 2, "length", "ab"),
        ({"max_new_tokens": 4}, 9, [1, 2, 3, 4], [1, 2, 3, 4], 3, "length", "abcd"),
        ({"max_new_tokens": 5}, 9, [1, 2, 3, 4], [1, 2, 3, 4], 3, None, "abcd"),
        ({"max_new_tokens": 5}, 3, [1, 2, 3, 4], [1, 2, 3], 3, "length", "abc"),  # the context is full first
        ({"max_new_tokens": 2}, 9, [1, EOS, 3], [1, EOS], 2, "stop", "a"),  # both at once
        ({"max_new_tokens": 2}, 9, [1, 2, EOS], [1, 2], 2, "length", "ab"),
        ({"max_new_tokens": 1, "ignore_eos": True}, 9, [EOS, 2], [EOS], 1, "length", ""),
        ({"stop": "bc"}, 9, [1, 2, 3, 4, 5], [1, 2, 3], 3, "stop", "a"),  # inside the path
        ({"stop": "bc"}, 9, [1, 2, 4, 2, 3], [1, 2, 4, 2, 3], 4, "stop", "abd"),
        ({"stop": "y"}, 9, [1, 27, 2], [1, 27], 2, "stop", "ax"),  # inside a token
        ({"stop": ["zz", "b"]}, 9, [1, 2, EOS], [1, 2], 2, "stop", "a"),  # before the end of the sequence
        ({"stop": "bcd"}, 9, [1, 2, 3, EOS], [1, 2, 3, EOS], 3, "stop", "abc"),  # only its beginning
        ({"stop": "bcd", "max_new_tokens": 3}, 9, [1, 2, 3, 4], [1, 2, 3], 3, "length", "abc"),
        ({"stop": "bc", "max_new_tokens": 3}, 9, [1, 2, 3, 4], [1, 2, 3], 3, "stop", "a"),
        ({"stop": "\ufffd", "max_new_tokens": 2}, 9, [1, 28, 3], [1, 28], 2, "stop", "a"),  # found only at the end
        ({"stop": "ab"}, 9, [1, EOS, 2, 2], [1, EOS], 2, "stop", "a"),
        ({"stop": "bc", "include_stop": True}, 9, [1, 2, 3, 4, 5], [1, 2, 3], 3, "stop", "abc"),
        ({"stop": "<eos>", "ignore_eos": True}, 9, [1, EOS, 2], [1, EOS], 2, "stop", "a"),
        ({"skip_special_tokens": False}, 9, [1, EOS, 2], [1, EOS], 2, "stop", "a<eos>"),
        ({"stop_token_ids": [2, 5]}, 9, [1, 2, 3], [1, 2], 2, "stop", "ab"),
        ({"stop_token_ids": [5]}, 9, [1, EOS, 3], [1, EOS], 2, "stop", "a"),
        ({"stop_token_ids": [3], "ignore_eos": True}, 9, [1, EOS, 3, 4], [1, EOS, 3], 3, "stop", "ac"),
        ({"stopping_criteria": [at_least(4)]}, 9, [1, 2, 3], [1, 2], 2, "stop", "ab"),
        ({"stopping_criteria": [at_least(9), at_least(4)]}, 9, [1, 2, 3], [1, 2], 2, "stop", "ab"),
        ({"stopping_criteria": [at_least(4)], "stop": "bcd"}, 9, [1, 2, 3], [1, 2], 2, "stop", "ab"),
        ({"stopping_criteria": [at_least(4)], "max_new_tokens": 2}, 9, [1, 2, 3], [1, 2], 2, "stop", "ab"),
        ({"stopping_criteria": [at_least(9)]}, 9, [1, 2], [1, 2], 1, None, "ab"),
    ],
)
def test_where_the_text_ends(
    letters: Any,
    params: dict[str, Any],
    space: int,
    tokens: list[int],
    emitted: list[int],
    accepted: int,
    reason: str | None,
    text: str,
) -> None:
    request = request_for(letters, space, **params)
    assert request.append_tokens(tokens, len(tokens) - 1, 6, None) == reason
    assert request.tokens == emitted
    assert request.all_tokens == [7, 8, *emitted]
    chunk = last_chunk(request)
    assert chunk.token_ids == tuple(emitted)
    assert chunk.accepted == accepted
    assert len(chunk.pieces) == len(emitted)
    assert "".join(chunk.pieces) == chunk.text == text
    request.finish("stop", {})
    assert request.completion is not None
    stats = request.completion.stats
    assert (stats.new_tokens, stats.accepted_tokens, stats.draft_tokens) == (len(emitted), accepted, 6)
    assert stats.acceptance_histogram == (0,) * accepted + (1,)


def test_a_step_without_a_bonus_token(letters: Any) -> None:
    """The rest of a step in which the target failed after the accepted candidates."""
    request = request_for(letters)
    assert request.append_tokens([1, 2], 2, 3, None) is None
    assert last_chunk(request) == Chunk("ab", (1, 2), 2, ("a", "b"))
    assert request.append_tokens([3, EOS], 2, 3, None) == "stop"
    request.finish("stop", {})
    assert request.completion is not None
    assert request.completion.stats.acceptance_histogram == (0, 0, 2)


def test_a_stop_string_over_two_steps(letters: Any) -> None:
    request = request_for(letters, stop="cd")
    assert request.append_tokens([1, 2, 3], 2, 2, None) is None
    assert last_chunk(request).pieces == ("a", "b", "")
    assert request.append_tokens([4, 5], 1, 2, None) == "stop"
    assert last_chunk(request) == Chunk("", (4,), 1, ("",))
    assert request.tokens == [1, 2, 3, 4]


def test_held_back_text_is_released_with_the_token_that_makes_it_final(letters: Any) -> None:
    request = request_for(letters, stop="cd")
    request.append_tokens([1, 3], 1, 1, None)
    request.append_tokens([3, 5, 3], 2, 2, None)
    assert [chunk.pieces for chunk in request.chunks] == [("a", ""), ("c", "ce", "")]
    assert request.append_tokens([EOS], 0, 0, None) == "stop"
    assert last_chunk(request).pieces == ("c",)


def test_completion_comes_with_the_last_chunk(letters: Any) -> None:
    request = request_for(letters)
    for tokens, drafted in (([1, 2, 3], 4), ([4], 4), ([5, 6, 7], 4), ([8, 9], 0), ([1, 2, EOS, 4, 5], 4)):
        reason = request.append_tokens(tokens, len(tokens) - 1, drafted, None)
    assert reason == "stop"
    assert request.completion is None
    request.finish("stop", {"target": 2.0, "draft": 1.0})
    done = request.completion
    assert done is not None
    assert request.done
    assert [chunk.completion for chunk in request.chunks] == [None] * 4 + [done]
    assert done.text == "abcdefghiab" == "".join(chunk.text for chunk in request.chunks)
    assert done.token_ids == (1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, EOS)
    assert done.token_ids == sum((chunk.token_ids for chunk in request.chunks), ())
    assert (done.finish_reason, done.logprobs) == ("stop", None)
    stats = done.stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.target_calls) == (2, 12, 5)
    assert stats.acceptance_histogram == (1, 1, 2, 1)
    assert (stats.draft_tokens, stats.accepted_tokens) == (16, 0 + 1 + 2 + 2 + 3)
    assert sum(stats.acceptance_histogram) == stats.target_calls
    assert stats.tokens_per_second == 4


def test_log_probabilities_are_the_models_own() -> None:
    """Against float64, to 1e-5; only for emitted tokens; alternatives in descending order."""
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)) * 4
    request = request_for(None, logprobs=3, temperature=0.2, top_k=1)
    for tokens, start in (([11, 12], 0), ([5, EOS, 9], 1)):
        steps = token_logprobs(logits[None, start : start + len(tokens)], torch.tensor([tokens]), 5)
        reason = request.append_tokens(tokens, len(tokens) - 1, 3, steps[0])
    assert reason == "stop"
    request.finish("stop", {})
    assert request.completion is not None
    assert request.completion.logprobs is not None
    expected = logits[[0, 1, 1, 2]].double().log_softmax(-1)
    assert [entry.token_id for entry in request.completion.logprobs] == [11, 12, 5, EOS]
    for entry, row in zip(request.completion.logprobs, expected, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-5)
        best = row.topk(3)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize(("asked", "given"), [(0, 0), (5, 5), (20, 8)])
def test_as_many_alternatives_as_asked_for(asked: int, given: int) -> None:
    request = request_for(None, logprobs=asked)
    logits = torch.zeros(1, 1, 8, dtype=torch.bfloat16)
    request.append_tokens([1], 0, 0, token_logprobs(logits, torch.tensor([[1]]), asked)[0])
    request.finish("length", {})
    assert request.completion is not None
    assert request.completion.logprobs is not None
    assert [len(entry.top) for entry in request.completion.logprobs] == [given]
    assert request.completion.logprobs[0].logprob == pytest.approx(-2.0794415)


def test_stopping_criteria_see_every_text_that_there_is(letters: Any) -> None:
    """Each is called after every token, with all tokens so far, and no more once the text has ended."""
    seen: list[list[Any]] = [[], []]
    criteria = [lambda ids, scores, log=log: log.append((ids.tolist(), scores)) for log in seen]
    request = request_for(letters, stopping_criteria=criteria)
    assert request.append_tokens([1, 2], 1, 1, None) is None
    assert request.append_tokens([3, EOS, 4], 2, 2, None) == "stop"
    texts = [[7, 8, 1], [7, 8, 1, 2], [7, 8, 1, 2, 3], [7, 8, 1, 2, 3, EOS]]
    assert seen == [[([text], None) for text in texts]] * 2


@pytest.mark.parametrize("criterion", [lambda *_: 1 / 0, lambda ids, _: torch.zeros(2, dtype=torch.bool)])
def test_a_criterion_that_fails_fails_its_request(letters: Any, criterion: Any) -> None:
    request = request_for(letters, stopping_criteria=[criterion])
    assert request.append_tokens([1, 2], 1, 1, None) is None
    assert request.done
    assert isinstance(request.error, StoppingCriterionFailed)
    assert isinstance(request.error.__cause__, ZeroDivisionError | RuntimeError)
    assert request.error.hint
    assert request.tokens == [1]


def test_seeds_of_several_completions() -> None:
    """Fixed by the seed of the first; none is that of another, nor of a neighbouring seed."""
    groups = []
    for seed in range(20):
        first = request_for(None, seed=seed, n=8)
        groups.append([first.params.seed, *(other.params.seed for other in first.others())])
        assert [other.params.seed for other in request_for(None, seed=seed, n=3).others()] == groups[-1][1:3]
    assert len({seed for group in groups for seed in group}) == 160
    assert len({other.seed for other in request_for(None, n=8).others()}) == 7
    assert request_for(None).others() == []


def test_no_tokenizer_no_text() -> None:
    request = request_for(None, stop="a")
    assert request.append_tokens([1, 2, EOS, 3], 3, 2, None) == "stop"
    assert last_chunk(request) == Chunk("", (1, 2, EOS), 3, ("", "", ""))


@pytest.mark.parametrize(
    ("seed", "signed"), [(0, 0), (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**64 - 1, -1), (2**63 + 5, 5 - 2**63)]
)
def test_a_seed_keeps_its_64_bits(seed: int, signed: int) -> None:
    request = request_for(None, seed=seed)
    assert request.seed == signed
    assert torch.tensor(request.seed, dtype=torch.int64).item() % 2**64 == seed


def test_no_seed_is_a_fresh_one() -> None:
    """Two in 64 bits are equal once in 2**64 runs."""
    assert request_for(None).seed != request_for(None).seed
