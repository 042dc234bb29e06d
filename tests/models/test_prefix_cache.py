"""The prefix cache by itself: what is found again, what is dropped, and that the kept values are the right ones."""

import pytest
import torch

from mcsd.models import Cache, TokenLayout, TransformersModel
from mcsd.models.prefill import prefill, score_text
from mcsd.models.prefix_cache import PrefixCache, TextsByBeginning, common_length, longest_common
from mcsd.testing import TabularModel
from support.exact import exact, random_tokens

BLOCK = 4


@pytest.fixture(autouse=True)
def block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcsd.models.prefix_cache.BLOCK", BLOCK)


def lengths_only() -> tuple[Cache, PrefixCache]:
    cache = TabularModel(torch.eye(2)).new_cache(8, 100)
    return cache, PrefixCache(cache, 2)


def keep(cache: Cache, prefixes: PrefixCache, text: list[int]) -> None:
    """Keep a text as a sequence that has read all of it."""
    index = cache.add()
    cache.advance([len(text)], slice(index, index + 1))
    prefixes.keep(index, text)
    cache.remove(index)


def test_common_beginnings() -> None:
    for first, second, expected in [
        ([], [1], 0),
        ([1, 2], [1, 2], 2),
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7, 8], 5),
        ([1, 2, 3, 4], [1, 2, 3, 4, 5], 4),
        (list(range(9)), list(range(9)), 9),
        ([2, 1], [1, 1], 0),
    ]:
        assert common_length(first, second) == common_length(second, first) == expected
    others = {7: [1, 2, 3], 8: [1, 2, 3, 4, 9], 9: [1, 2, 3, 4, 5, 6]}
    assert longest_common([1, 2, 3, 4, 5, 7], others) == (9, 5)
    assert longest_common([1, 2, 3], others) == (7, 3)
    assert longest_common([0, 2, 0], others) == (-1, 0)


def test_texts_are_compared_with_those_that_begin_with_the_same_block() -> None:
    texts = TextsByBeginning()
    long = list(range(BLOCK + 9))
    for key, text in enumerate((long, [*long[:BLOCK], 5], [1, *long], long[:3], [])):
        texts.add(key, text)
    assert set(texts.like(long)) == set(texts.like([*long[:BLOCK], 7, 7])) == {0, 1}
    assert set(texts.like(long[:3])) == {3}
    assert set(texts.like([])) == {4}
    assert not texts.like(long[1:])


def test_the_longest_kept_beginning_is_found() -> None:
    cache, prefixes = lengths_only()
    keep(cache, prefixes, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    keep(cache, prefixes, [1, 2, 3, 4, 5, 6, 0, 0, 0])
    cases = {
        (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11): 10,
        (1, 2, 3, 4, 5, 6, 7, 8, 9): 9,
        (1, 2, 3, 4, 5, 6, 0): 7,
        (1, 2, 3, 4, 5): 5,
        (1, 2, 3, 9): 0,  # Less than a block.
        (2, 2, 3, 4, 5): 0,
        (): 0,
    }
    for text, expected in cases.items():
        assert prefixes.match(text) == expected
        index = cache.add()
        assert prefixes.start(index, text) == cache.host_lengths[index] == cache.lengths[index] == expected
        cache.remove(index)


def test_common_blocks_are_kept_once_and_a_continued_text_counts_once() -> None:
    cache, prefixes = lengths_only()
    keep(cache, prefixes, [1, 2, 3, 4, 5, 6])
    keep(cache, prefixes, [1, 2, 3, 4, 5, 6, 7])
    keep(cache, prefixes, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    keep(cache, prefixes, [1, 2, 3, 4, 5])
    assert prefixes.stats[:2] == (1, 9)
    keep(cache, prefixes, [1, 2, 3, 4, 0, 0])
    assert prefixes.stats[:2] == (2, 11)


def test_the_text_that_was_not_used_for_the_longest_time_is_dropped() -> None:
    cache, prefixes = lengths_only()
    first, second, third = [[token] * 6 for token in (1, 2, 3)]
    keep(cache, prefixes, first)
    keep(cache, prefixes, second)
    prefixes.start(cache.add(), [*first, 9])
    keep(cache, prefixes, third)
    assert [prefixes.match(text) for text in (first, second, third)] == [6, 0, 6]
    assert prefixes.stats[:2] == (2, 12)


def test_a_common_beginning_outlives_the_text_it_was_kept_with() -> None:
    cache, prefixes = lengths_only()
    system = [5, 5, 5, 5]
    for user in range(10):
        keep(cache, prefixes, [*system, user, user])
        assert prefixes.stats[:2] == (min(2, user + 1), 4 + 2 * min(2, user + 1))
    assert prefixes.match([*system, 99, 99]) == 4


def test_without_texts_nothing_is_kept_and_clear_drops_all() -> None:
    cache, prefixes = lengths_only()
    keep(cache, prefixes, [1] * 8)
    prefixes.clear()
    assert prefixes.stats[:3] == (0, 0, 0)
    assert prefixes.match([1] * 8) == 0
    off = PrefixCache(cache, 0)
    keep(cache, off, [1] * 8)
    assert off.stats[:3] == (0, 0, 0)


def test_a_cache_of_another_kind_keeps_nothing() -> None:
    class Other(Cache):
        """Has state that nothing here copies."""

    cache = Other(2, torch.device("cpu"))
    prefixes = PrefixCache(cache)
    keep(cache, prefixes, [1] * 8)
    assert prefixes.stats.texts == 0


@pytest.mark.parametrize("limit", [0, 1, 3, 7])
def test_memory_stays_within_its_limit(limit: int) -> None:
    model = TransformersModel(exact("llama"))
    cache = model.new_cache(2, 40)
    prefill(model, cache, cache.add(), [1])
    size = BLOCK * cache.bytes_per_token
    prefixes = PrefixCache(cache, max_bytes=limit * size)
    for seed in range(6):
        text = random_tokens(seed, 18)
        index = cache.add()
        prefill(model, cache, index, text)
        prefixes.keep(index, text)
        cache.remove(index)
        stats = prefixes.stats
        assert stats.bytes == stats.tokens * cache.bytes_per_token <= limit * size
        # Of one text that is too long, the beginning is kept.
        assert prefixes.match(text) == min(18, limit * BLOCK)


@pytest.mark.parametrize("kind", ["llama", "mistral-window", "gemma3-mixed", "opt"])
def test_a_started_sequence_goes_on_like_one_that_has_read_all(kind: str) -> None:
    model = TransformersModel(exact(kind))
    cache = model.new_cache(4, 40)
    prefixes = PrefixCache(cache)
    text = random_tokens(0, 30)
    index = cache.add()
    prefill(model, cache, index, text)
    prefixes.keep(index, text)
    other = cache.add()
    prefill(model, cache, other, random_tokens(1, 20))
    started = cache.add()
    for length in (30, 27, 16, 5):
        cache.remove(started)
        started = cache.add()
        continued = [*text[:length], *random_tokens(2, 36 - length)]
        assert prefixes.start(started, continued) >= length
        prefill(model, cache, started, continued[cache.host_lengths[started] : -1])
        chain, last = TokenLayout.chain(1), torch.tensor([continued[-1:]])
        logits = model.forward(last, chain, cache, slice(started, started + 1)).logits
        expected = model.network(torch.tensor([continued])).logits[:, -1:]
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)


def test_a_text_is_scored_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward, and so no mask, is longer than a chunk."""
    monkeypatch.setattr("mcsd.models.prefill._CHUNK", 7)
    model = TransformersModel(exact("mistral-window"))
    read: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, *args: (read.append(ids.shape[1]), forward(ids, *args))[1])
    text = random_tokens(0, 30)
    output = score_text(model, text, (-1,))
    expected = model.network(torch.tensor([text]), output_hidden_states=True)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(output.hidden, expected.hidden_states[-1], atol=1e-9, rtol=1e-9)
    assert read == [7, 7, 7, 7, 2]
