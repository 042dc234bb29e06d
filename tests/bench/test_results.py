"""Figures of known measurements, reckoned by hand."""

from typing import Any

import pytest

from mcsd.bench.journal import Accepted, Answered, Verified
from mcsd.bench.results import ALL, Results, acceptances, attentions, flat, overall, speeds
from mcsd.bench.tables import speed_table, verdict

PARTS = dict.fromkeys(("prefill", "draft", "target", "judge", "commit", "other"), 0.0)


def answered(system: str, prompts: str, number: int, tokens: int, seconds: float, calls: int, **more: Any) -> Answered:
    plain = system == "plain"
    values: dict[str, Any] = {
        **{"system": system, "role": "plain" if plain else "multi", "draft": "draft", "tree": "2x1", "scheme": "mcss"},
        **{"prompts": prompts, "numbers": [number], "temperature": 1.0, "repeat": 0, "seeds": [0]},
        **{"prompt_tokens": [3], "token_ids": [[1] * tokens], "seconds": seconds},
        "parts": PARTS | {"prefill": 9.0, "draft": 0.25 * seconds, "target": 0.5 * seconds},
        **{"target_calls": [calls], "draft_tokens": [0 if plain else 4 * calls]},
        **{"accepted_tokens": [tokens - calls], "histogram": [calls]},
    }
    return Answered(**values | more)


KNOWN = [
    answered("plain", "a", 0, 10, 1.0, 10),
    answered("plain", "a", 1, 30, 3.0, 30),
    answered("plain", "b", 0, 20, 4.0, 20),
    answered("2x1 mcss", "a", 1, 40, 2.0, 10),
    answered("2x1 mcss", "a", 0, 10, 1.0, 5),
    answered("2x1 mcss", "b", 0, 30, 3.0, 25),
]


def test_speeds_are_ratios_of_sums() -> None:
    rows = {(row.prompts, row.system): row for row in speeds(KNOWN)}
    assert list(rows) == [(p, s) for p in ("a", "b", ALL) for s in ("plain", "2x1 mcss")]
    row = rows[ALL, "2x1 mcss"]
    assert (row.requests, row.new_tokens) == (3, 80)
    assert row.tokens_per_second.value == pytest.approx(80 / 6)
    assert row.speedup.value == pytest.approx(80 / 6 / (60 / 8))
    assert row.block_efficiency is not None
    assert row.block_efficiency.value == pytest.approx(80 / 40)
    assert row.mean_acceptance_length == pytest.approx((40 / 10 + 10 / 5 + 30 / 25) / 3)
    assert row.draft_acceptance_rate == pytest.approx(40 / 160)
    assert row.candidates == pytest.approx(4)
    assert row.step == pytest.approx({"draft": 37.5, "target": 75.0, "judge": 0.0, "commit": 0.0, "other": 0.0})
    assert rows["a", "2x1 mcss"].speedup.value == pytest.approx(50 / 3 / (40 / 4))
    assert rows["a", "2x1 mcss"].speedup.low is None
    assert rows[ALL, "plain"].speedup.low == rows[ALL, "plain"].speedup.high == pytest.approx(1.0)
    assert rows[ALL, "plain"].draft_acceptance_rate is None


def test_the_interval_pairs_prompts_whatever_order_they_came_in() -> None:
    """Twice as fast on every prompt is twice as fast beyond doubt."""
    tokens = [(10, 1.0), (20, 3.0), (30, 2.0)]
    fast = [answered("2x1 mcss", "a", i, t, s / 2, 5) for i, (t, s) in reversed(list(enumerate(tokens)))]
    plain = [answered("plain", "a", i, t, s, 5) for i, (t, s) in enumerate(tokens)]
    row = speeds([*plain, *fast])[-1]
    assert row.speedup.low == pytest.approx(2.0)
    assert row.speedup.high == pytest.approx(2.0)


def test_repeats_of_a_prompt_are_one_unit_and_batches_apart() -> None:
    repeated = [answered("plain", "a", 0, 10, 1.0, 10, repeat=r) for r in range(4)]
    assert speeds(repeated)[0].tokens_per_second.low is None
    both = answered("plain", "a", 0, 10, 1.0, 9, numbers=[0, 1], target_calls=[9, 4], token_ids=[[1] * 9, [1] * 4])
    one, two = speeds([answered("plain", "a", 0, 10, 1.0, 10), both])
    assert (one.batch, two.batch) == (1, 2)
    assert two.requests == 2
    assert two.tokens_per_second.value == 13
    # Nine steps, since rows run together.
    assert two.step["target"] == pytest.approx(1e3 * 0.5 / 9)


def test_what_transformers_does_not_tell() -> None:
    silent = {"target_calls": [], "draft_tokens": [], "accepted_tokens": [], "histogram": [], "parts": {}}
    rows = speeds([*KNOWN[:2], *(answered("assisted", "a", i, 20, 1.0, 1, role="assisted", **silent) for i in (0, 1))])
    row = flat(rows[-1])
    assert row["speedup"] == pytest.approx(2.0)
    assert [row[name] for name in ("block_efficiency", "mean_acceptance_length", "candidates")] == [None] * 3
    assert list(row) == list(flat(rows[0]))


def test_the_verdict() -> None:
    results = Results(tuple(speeds(KNOWN)), (), (), {})
    assert [row.system for row in results.best()] == ["2x1 mcss"]
    (line,) = verdict(results)
    # Without one prompt it is 1.96, 1.67 or 1.67; their logarithms' error is 0.108, times 4.17.
    assert line == "temperature 1: fastest is 2x1 mcss, 1.78 [1.13, 2.79] times plain decoding"
    uneven = [*KNOWN[:5], answered("2x1 mcss", "b", 0, 30, 6.0, 25)]
    (line,) = verdict(Results(tuple(speeds(uneven)), (), (), {}))
    assert line.endswith("too close to tell them apart")
    few = Results(tuple(speeds([*KNOWN[:2], *KNOWN[3:5]])), (), (), {})
    assert verdict(few) == ["temperature 1: fastest is 2x1 mcss, 1.67 times plain decoding, on too few prompts to tell"]
    slow = Results(tuple(speeds(KNOWN[:3])), (), (), {})
    assert verdict(slow) == ["temperature 1: nothing beats plain decoding"]
    assert len(speed_table(results.speeds)) == 7


def test_acceptance_is_a_share_of_positions() -> None:
    entries = [
        Accepted("draft", "mcss", "a", 0, 1.0, 10, [2, 4]),
        Accepted("draft", "mcss", "a", 1, 1.0, 30, [10, 20]),
        Accepted("draft", "mcss", "b", 0, 1.0, 10, [10, 10]),
    ]
    a, b, everything = acceptances(entries)
    assert [interval.value for interval in a.within] == pytest.approx([12 / 40, 24 / 40])
    assert [interval.value for interval in everything.within] == pytest.approx([22 / 50, 34 / 50])
    assert (b.texts, everything.texts, everything.tried) == (1, 3, 50)
    assert everything.within[1].high == 1.0
    assert overall([a, b, everything]) == [everything]
    assert overall([a]) == [a]
    assert flat(everything)["k2"] == pytest.approx(34 / 50)


def test_a_tree_against_its_paths() -> None:
    entries = [Verified("2x1", 4, 2, 2, i, 0.01, 0.03) for i in range(3)]
    (row,) = attentions(entries)
    assert (row.tree_ms, row.batch_ms, row.times.value) == pytest.approx((10.0, 30.0, 3.0))
