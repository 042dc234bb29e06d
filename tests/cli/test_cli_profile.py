"""``--profile``: the parts add up to the step; memory limits."""

from typing import Any

import pytest

import mcsd
from mcsd.cli.profile import StepPart, StepProfile, StepProfiler, bandwidth, profile_table
from support.tiny import tiny

PARTS = ["draft", "target", "judge", "commit", "other"]


def engine(draft: Any, tree: str) -> mcsd.Engine:
    return mcsd.Engine(tiny("llama"), draft, tree=tree, max_length=64)


def linear_bytes(network: Any) -> int:
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return sum(tensor.nbytes for name, tensor in tensors if "embed_tokens" not in name)


def test_parts_cover_the_steps_since_construction() -> None:
    draft = tiny("llama", seed=1)
    subject = engine(draft, "2x1")
    subject.generate([[1, 2, 3]], mcsd.SamplingParams(max_new_tokens=20))
    profiler = StepProfiler(subject)
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
def test_each_forward_reads_the_kv_cache(tree: str, levels: int) -> None:
    subject = engine(tiny("llama", seed=1), tree)
    profiler = StepProfiler(subject)
    chunks = list(subject.stream([4, 5, 6, 7], mcsd.SamplingParams(max_new_tokens=20)))
    # At the start of a step: all tokens but the last one.
    lengths, length = [], 3
    for chunk in chunks:
        lengths.append(length)
        length += len(chunk.token_ids)
    assert length == 23
    # Layers, keys and values, heads, head size, bytes of a float32.
    text = 2 * 2 * 2 * 8 * 4 * sum(lengths) / len(lengths)
    reads = {part.name: part.cache_bytes for part in profiler.profile(chunks).parts}
    assert reads == pytest.approx({"draft": levels * text, "target": text, "judge": 0, "commit": 0, "other": 0})


def test_the_memory_limit_covers_weights_and_kv_cache() -> None:
    subject = engine(tiny("llama", seed=1), "2x1")
    profiler = StepProfiler(subject)
    found = profiler.profile(list(subject.stream([4, 5, 6, 7], mcsd.SamplingParams(max_new_tokens=20))))
    for part in found.parts[:2]:
        assert part.least == pytest.approx((part.weight_bytes + part.cache_bytes) / found.bandwidth)


def test_ngram_drafting_reads_nothing() -> None:
    subject = engine("ngram", "2x1")
    profiler = StepProfiler(subject)
    draft = profiler.profile(list(subject.stream([4, 5], mcsd.SamplingParams(max_new_tokens=4)))).parts[0]
    assert draft.weight_bytes == draft.cache_bytes == draft.least == 0


def test_memory_bandwidth_is_plausible() -> None:
    assert 1e9 < bandwidth("cpu") < 1e12


def test_the_table_shows_the_measurements() -> None:
    parts = (StepPart("draft", 0.010, 40_000_000, 10_000_000.0, 0.005), StepPart("judge", 0.030, 0, 0.0, 0.0))
    lines = profile_table(StepProfile(7, 10e9, parts, {"target": "float32", "draft": ""}, "mcss-wor", "2x1", 220, 42))
    assert lines.pop(0) == "target: float32"
    assert lines.pop(0) == "scheme: mcss-wor; tree: 2x1; 42 of 220 candidates accepted"
    assert lines[0] == "7 steps of 40.0 ms; memory bandwidth 10.0 GB/s"
    assert lines[2].split() == ["draft", "10.00", "25.0%", "40", "MB", "10.0", "MB", "5.0", "ms", "2.0"]
    assert lines[3].split() == ["judge", "30.00", "75.0%"]
