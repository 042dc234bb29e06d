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
    (done,) = subject.generate([[4, 5]], mcsd.SamplingParams(max_new_tokens=20))
    found = profiler.profile(done)
    assert found.steps == done.stats.target_calls
    assert [part.name for part in found.parts] == PARTS
    spent = sum(part.seconds for part in found.parts) * found.steps
    assert spent == pytest.approx(sum(done.stats.seconds.values()) - done.stats.seconds["prefill"], rel=0.1)
    reads = {part.name: part.bytes_read for part in found.parts}
    # The draft's two levels are a forward each.
    assert reads["draft"] == 2 * linear_bytes(draft)
    assert reads["target"] == linear_bytes(subject.target.network)  # type: ignore[attr-defined]
    assert reads["judge"] == reads["commit"] == reads["other"] == 0


def test_look_up_and_tables_read_no_weights() -> None:
    subject = engine("ngram", "2x1")
    profiler = Profiler(subject)
    (done,) = subject.generate([[4, 5]], mcsd.SamplingParams(max_new_tokens=4))
    assert profiler.profile(done).parts[0].bytes_read == 0


def test_memory_is_read_at_a_rate_a_machine_can_have() -> None:
    assert 1e9 < bandwidth("cpu") < 1e12


def test_the_table_is_what_was_measured() -> None:
    parts = (Part("draft", 0.010, 50_000_000, 0.005), Part("judge", 0.030, 0, 0.0))
    lines = table(Profile(7, 10e9, parts))
    assert lines[0] == "7 steps of 40.0 ms; memory gives 10.0 GB/s"
    assert lines[2].split() == ["draft", "10.00", "25.0%", "50", "MB", "5.0", "ms", "2.0"]
    assert lines[3].split() == ["judge", "30.00", "75.0%"]
