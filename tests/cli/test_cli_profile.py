"""``--profile``: parts that add up to the step, and what memory allows."""

from typing import Any

import pytest

import mcsd
from conftest import tiny
from mcsd.cli.profile import Part, Profile, Profiler, bandwidth, table

PARTS = ["draft", "target", "judge", "commit", "other"]


def engine(draft: Any, tree: str) -> mcsd.Engine:
    return mcsd.Engine(tiny("llama"), draft, tree=tree, max_length=64)


def linear_bytes(network: Any) -> int:
    return sum(p.nbytes for name, p in network.named_parameters() if "embed_tokens" not in name)


def test_parts_are_those_of_the_steps_since_it_began() -> None:
    draft = tiny("llama", seed=1)
    subject = engine(draft, "2x1")
    subject.generate([[1, 2, 3]], mcsd.SamplingParams(max_new_tokens=20))
    profiler = Profiler(subject)
    chunks = list(subject.stream([4, 5], mcsd.SamplingParams(max_new_tokens=20)))
    found = profiler.profile(chunks)
    done = chunks[-1].completion
    assert done is not None
    assert found.steps == done.stats.target_calls
    assert [part.name for part in found.parts] == PARTS
    spent = sum(part.seconds for part in found.parts) * found.steps
    assert spent == pytest.approx(sum(done.stats.seconds.values()) - done.stats.seconds["prefill"], rel=0.1)
    reads = {part.name: part.weight_bytes for part in found.parts}
    # The draft's two levels are a forward each.
    assert reads["draft"] == 2 * linear_bytes(draft)
    assert reads["target"] == linear_bytes(subject.target.network)  # type: ignore[attr-defined]
    assert reads["judge"] == reads["commit"] == reads["other"] == 0


@pytest.mark.parametrize(("tree", "levels"), [("2x1", 2), ("none", 0)])
def test_each_forward_reads_the_keys_and_values_of_the_text_before(tree: str, levels: int) -> None:
    subject = engine(tiny("llama", seed=1), tree)
    profiler = Profiler(subject)
    chunks = list(subject.stream([4, 5, 6, 7], mcsd.SamplingParams(max_new_tokens=20)))
    # Where a step begins: all that was there but the last token.
    lengths, length = [], 3
    for chunk in chunks:
        lengths.append(length)
        length += len(chunk.token_ids)
    assert length == 23
    # Layers, keys and values, heads, size of a head, bytes of a float32.
    text = 2 * 2 * 2 * 8 * 4 * sum(lengths) / len(lengths)
    reads = {part.name: part.cache_bytes for part in profiler.profile(chunks).parts}
    assert reads == pytest.approx({"draft": levels * text, "target": text, "judge": 0, "commit": 0, "other": 0})


def test_memory_alone_delivers_weights_and_keys_and_values() -> None:
    subject = engine(tiny("llama", seed=1), "2x1")
    profiler = Profiler(subject)
    found = profiler.profile(list(subject.stream([4, 5, 6, 7], mcsd.SamplingParams(max_new_tokens=20))))
    for part in found.parts[:2]:
        assert part.least == pytest.approx((part.weight_bytes + part.cache_bytes) / found.bandwidth)


def test_look_up_reads_nothing() -> None:
    subject = engine("ngram", "2x1")
    profiler = Profiler(subject)
    draft = profiler.profile(list(subject.stream([4, 5], mcsd.SamplingParams(max_new_tokens=4)))).parts[0]
    assert draft.weight_bytes == draft.cache_bytes == draft.least == 0


def test_memory_is_read_at_a_rate_a_machine_can_have() -> None:
    assert 1e9 < bandwidth("cpu") < 1e12


def test_the_table_is_what_was_measured() -> None:
    parts = (Part("draft", 0.010, 40_000_000, 10_000_000.0, 0.005), Part("judge", 0.030, 0, 0.0, 0.0))
    lines = table(Profile(7, 10e9, parts))
    assert lines[0] == "7 steps of 40.0 ms; memory gives 10.0 GB/s"
    assert lines[2].split() == ["draft", "10.00", "25.0%", "40", "MB", "10.0", "MB", "5.0", "ms", "2.0"]
    assert lines[3].split() == ["judge", "30.00", "75.0%"]
