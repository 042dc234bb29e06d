"""Rows of known measurements, computed by hand."""

from typing import Any

import pytest

from mcsd.bench.records import AcceptanceRecord, AttentionRecord, RequestRecord
from mcsd.bench.results import ALL_PROMPTS, Results, acceptance_rows, attention_rows, flatten, overall, speed_rows
from mcsd.bench.tables import conclusions, speed_table

PARTS = dict.fromkeys(("prefill", "draft", "target", "judge", "commit", "other"), 0.0)


def answered(
    system: str, prompts: str, number: int, tokens: int, seconds: float, calls: int, **more: Any
) -> RequestRecord:
    plain = system == "plain"
    values: dict[str, Any] = {
        **{"system": system, "role": "plain" if plain else "multi", "draft": "draft", "tree": "2x1", "scheme": "mcss"},
        **{"prompts": prompts, "numbers": [number], "temperature": 1.0, "repeat": 0, "seeds": [0]},
        **{"prompt_tokens": [3], "token_ids": [[1] * tokens], "seconds": seconds},
        "parts": PARTS | {"prefill": 9.0, "draft": 0.25 * seconds, "target": 0.5 * seconds},
        **{"target_calls": [calls], "draft_tokens": [0 if plain else 4 * calls]},
        **{"accepted_tokens": [tokens - calls], "histogram": [calls]},
    }
    return RequestRecord(**values | more)


KNOWN = [
    answered("plain", "a", 0, 10, 1.0, 10),
    answered("plain", "a", 1, 30, 3.0, 30),
    answered("plain", "b", 0, 20, 4.0, 20),
    answered("2x1 mcss", "a", 1, 40, 2.0, 10),
    answered("2x1 mcss", "a", 0, 10, 1.0, 5),
    answered("2x1 mcss", "b", 0, 30, 3.0, 25),
]


def test_speeds_are_ratios_of_sums() -> None:
    rows = {(row.prompts, row.system): row for row in speed_rows(KNOWN)}
    assert list(rows) == [(p, s) for p in ("a", "b", ALL_PROMPTS) for s in ("plain", "2x1 mcss")]
    row = rows[ALL_PROMPTS, "2x1 mcss"]
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
    assert rows[ALL_PROMPTS, "plain"].speedup.low == rows[ALL_PROMPTS, "plain"].speedup.high == pytest.approx(1.0)
    assert rows[ALL_PROMPTS, "plain"].draft_acceptance_rate is None


def test_the_interval_pairs_prompts_in_any_order() -> None:
    """Twice as fast on every prompt: the interval is a point."""
    tokens = [(10, 1.0), (20, 3.0), (30, 2.0)]
    fast = [answered("2x1 mcss", "a", i, t, s / 2, 5) for i, (t, s) in reversed(list(enumerate(tokens)))]
    plain = [answered("plain", "a", i, t, s, 5) for i, (t, s) in enumerate(tokens)]
    row = speed_rows([*plain, *fast])[-1]
    assert row.speedup.low == pytest.approx(2.0)
    assert row.speedup.high == pytest.approx(2.0)


def test_repeats_of_a_prompt_are_one_unit_and_batches_are_separate() -> None:
    repeated = [answered("plain", "a", 0, 10, 1.0, 10, repeat=r) for r in range(4)]
    assert speed_rows(repeated)[0].tokens_per_second.low is None
    both = answered("plain", "a", 0, 10, 1.0, 9, numbers=[0, 1], target_calls=[9, 4], token_ids=[[1] * 9, [1] * 4])
    one, two = speed_rows([answered("plain", "a", 0, 10, 1.0, 10), both])
    assert (one.batch, two.batch) == (1, 2)
    assert two.requests == 2
    assert two.tokens_per_second.value == 13
    # Nine steps, since the sequences of a batch run together.
    assert two.step["target"] == pytest.approx(1e3 * 0.5 / 9)


def test_systems_outside_the_engine_report_tokens_and_time_only() -> None:
    outside = {"target_calls": [], "draft_tokens": [], "accepted_tokens": [], "histogram": [], "parts": {}}
    rows = speed_rows(
        [*KNOWN[:2], *(answered("assisted", "a", i, 20, 1.0, 1, role="assisted", **outside) for i in (0, 1))]
    )
    row = flatten(rows[-1])
    assert row["speedup"] == pytest.approx(2.0)
    assert [row[name] for name in ("block_efficiency", "mean_acceptance_length", "candidates")] == [None] * 3
    assert list(row) == list(flatten(rows[0]))


def test_the_conclusions() -> None:
    results = Results(tuple(speed_rows(KNOWN)), (), (), {})
    assert [row.system for row in results.best()] == ["2x1 mcss"]
    # Without one prompt it is 1.96, 1.67 or 1.67; their logarithms' error is 0.108, times 4.30.
    speedup = results.best()[0].speedup
    assert (speedup.low, speedup.high) == (pytest.approx(1.12, abs=0.005), pytest.approx(2.83, abs=0.005))
    said = "temperature 1: fastest is 2x1 mcss, 13.3 tokens/s, 1.78× plain decoding"
    reserved = "temperature 1: more prompts are needed to tell it from plain decoding"
    assert conclusions(results) == [said]
    uneven = [*KNOWN[:5], answered("2x1 mcss", "b", 0, 30, 6.0, 25)]
    assert conclusions(Results(tuple(speed_rows(uneven)), (), (), {}))[1:] == [reserved]
    few = Results(tuple(speed_rows([*KNOWN[:2], *KNOWN[3:5]])), (), (), {})
    said = "temperature 1: fastest is 2x1 mcss, 16.7 tokens/s, 1.67× plain decoding"
    assert conclusions(few) == [said, reserved]
    slow = Results(tuple(speed_rows(KNOWN[:3])), (), (), {})
    assert conclusions(slow) == ["temperature 1: fastest is plain, 7.5 tokens/s"]


GENERATED = [
    answered("generate", record.prompts, record.numbers[0], record.new_tokens, 2 * record.seconds, 0, **{
        **{"role": "generate", "target_calls": [], "draft_tokens": [], "accepted_tokens": [], "histogram": []},
        "parts": {},
    })
    for record in KNOWN[:3]
]  # fmt: skip


def test_speeds_over_generate() -> None:
    rows = {row.system: row for row in speed_rows([*KNOWN, *GENERATED]) if row.prompts == ALL_PROMPTS}
    speedups = {name: row.speedup_generate.value for name, row in rows.items() if row.speedup_generate}
    assert speedups == pytest.approx({"plain": 2.0, "2x1 mcss": 2 * 80 / 6 / (60 / 8), "generate": 1.0})
    results = Results(tuple(rows.values()), (), (), {})
    assert conclusions(results) == [
        "temperature 1: fastest is 2x1 mcss, 13.3 tokens/s, 3.56× generate, 1.78× plain decoding"
    ]
    assert flatten(rows["plain"])["speedup_generate_low"] == pytest.approx(2.0)
    without = flatten(speed_rows(KNOWN)[0])
    assert list(without) == list(flatten(rows["plain"]))
    assert [without[name] for name in ("speedup_generate", "speedup_generate_high")] == [None, None]


def test_speed_comes_before_acceptance_and_a_cell_holds_one_number() -> None:
    rows = [row for row in speed_rows([*KNOWN, *GENERATED]) if row.prompts == ALL_PROMPTS]
    table = speed_table(rows)
    assert table.names == (
        *("temp", "system", "tokens/s", "× generate", "× plain", "low", "high", "tokens/step", "accepted"),
    )
    assert table.rows[2] == ("1", "generate", "3.8", "1.00", "0.50", "0.50", "0.50", "-", "-")
    for row in speed_table(speed_rows([*KNOWN, *GENERATED]), details=True).rows:
        assert all(cell == "-" or float(cell.rstrip("%")) >= 0 for cell in row[3:])
    # Columns without figures are left out.
    assert "× generate" not in speed_table(speed_rows(KNOWN)).names
    assert "low" not in speed_table(speed_rows(KNOWN[:2])).names


def test_acceptance_is_a_share_of_positions() -> None:
    entries = [
        AcceptanceRecord("draft", "mcss", "a", 0, 1.0, 10, [2, 4]),
        AcceptanceRecord("draft", "mcss", "a", 1, 1.0, 30, [10, 20]),
        AcceptanceRecord("draft", "mcss", "b", 0, 1.0, 10, [10, 10]),
    ]
    a, b, everything = acceptance_rows(entries)
    assert [interval.value for interval in a.within] == pytest.approx([12 / 40, 24 / 40])
    assert [interval.value for interval in everything.within] == pytest.approx([22 / 50, 34 / 50])
    assert (b.texts, everything.texts, everything.tried) == (1, 3, 50)
    assert everything.within[1].high == 1.0
    assert overall([a, b, everything]) == [everything]
    assert overall([a]) == [a]
    assert flatten(everything)["k2"] == pytest.approx(34 / 50)


def test_the_median_repeat_gives_the_speed() -> None:
    """Of three repeats the one with the median time a token counts; calls are those of all three."""
    seconds = (1.0, 9.0, 2.0)
    repeated = [answered("plain", "a", 0, 10, s, 5, repeat=r) for r, s in enumerate(seconds)]
    (row,) = speed_rows(repeated)
    assert (row.requests, row.new_tokens, row.tokens_per_second.value) == (3, 30, 5.0)
    assert row.block_efficiency is not None
    assert row.block_efficiency.value == 2.0
    # Texts of other lengths: 0.1, 0.3 and 0.2 seconds a token.
    repeated = [
        answered("plain", "a", 0, tokens, s, 5, repeat=tokens) for tokens, s in ((10, 1.0), (20, 6.0), (5, 1.0))
    ]
    (row,) = speed_rows(repeated)
    assert row.tokens_per_second.value == 5.0


def test_the_overhead_is_the_time_outside_prefill_drafting_and_the_target() -> None:
    parts = {"prefill": 1.0, "draft": 2.0, "target": 5.0, "judge": 1.0, "commit": 0.25, "other": 0.75}
    (row,) = speed_rows([answered("plain", "a", 0, 10, 10.0, 5, parts=parts)])
    assert row.overhead == pytest.approx(0.2)


def test_a_tree_against_its_paths() -> None:
    entries = [AttentionRecord("2x1", 4, 2, 2, i, 0.01, 0.03) for i in range(3)]
    (row,) = attention_rows(entries)
    assert (row.tree_ms, row.batch_ms, row.times.value) == pytest.approx((10.0, 30.0, 3.0))
