"""``mcsd tune``: its profile, its output, and resuming a killed run."""

import json
import time
from pathlib import Path

import pytest

import mcsd
from mcsd.system import cache_folder
from mcsd.tune import TuneOptions, tune
from support.cli import Run, assert_one_line_error, start


def logs() -> list[Path]:
    return list((cache_folder("profiles")).glob("*.tuning.jsonl"))


def test_it_writes_the_profile_of_auto(run: Run, tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Name a river.\nWrite a poem.\n")
    words = ("tune", "--target", tiny, "--draft", tiny, "--dtype", "float32", "--prompts", prompts)
    done = run(*words, "--minutes", 0.2, "--json")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    kept = json.loads(Path(report["profile"]).read_text())
    sampled, greedy = report["comparisons"]
    assert (sampled["temperature"], greedy["temperature"]) == (1.0, 0.0)
    for comparison in (sampled, greedy):
        assert comparison["configurations"][0]["tree"] == "none"
        assert comparison["configurations"][0]["times"] == 1.0
        assert all(one["measured"] > 0 and one["slowest"] <= one["fastest"] for one in comparison["configurations"])
        assert comparison["prompts"] in (1, 2)
    # It is its own draft, not rounded in float32: at temperature 0 everything is accepted.
    assert kept["greedy"][0][0] > 0.75
    assert kept["findings"]["comparisons"] == report["comparisons"]
    fastest = max(
        (one for one in sampled["configurations"] if one["scheme"] == "mcss-wor"), key=lambda o: o["measured"]
    )
    assert kept["tree"] == list(mcsd.TreeShape.parse(fastest["tree"]).parents)
    assert not logs()
    engine = mcsd.Engine.load(str(tiny), str(tiny), dtype="float32", max_length=100)
    engine.generate("Name", mcsd.SamplingParams(seed=1, max_new_tokens=4))
    assert engine.tree.parents == tuple(kept["tree"])
    said = run(*words, "--minutes", 0.01)
    assert said.code == 0
    assert said.out.splitlines()[0] == f"target {tiny}, draft {tiny}, scheme mcss-wor"
    assert "at temperature 0:" in said.out


def test_a_killed_run_is_resumed(tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"What is {number}?" for number in range(40)))
    words = ("tune", "--target", tiny, "--draft", "ngram", "--prompts", prompts)
    process = start(*words, "--minutes", 0.5)
    while not (logs() and len(logs()[0].read_text().splitlines()) > 5):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    (log,) = logs()
    before = log.read_text().splitlines()
    with log.open("a") as file:
        file.write('{"kind": "comparison", "half')

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(TuneOptions(str(tiny), "ngram"), [f"What is {number}?" for number in range(40)], interrupt)
    assert log.read_text().splitlines() == before
    again = start(*words, "--minutes", 0.01)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert "kept in" in out
    assert not logs()


def test_measurements_are_not_repeated(tiny: Path) -> None:
    """Interrupted at every third request: only the one in flight runs twice."""
    prompts, options = ["Name a river.", "Write a poem."], TuneOptions(str(tiny), "ngram", minutes=1.0)
    said: list[str] = []
    for _ in range(100):
        before = len(said)

        def show(line: str, before: int = before) -> None:
            said.append(line)
            if len(said) - before == 4:
                raise KeyboardInterrupt

        try:
            report = tune(options, prompts, show)
        except KeyboardInterrupt:
            said.pop()
        else:
            break
    assert len(said) == len(set(said)) > 12
    assert [comparison.prompts for comparison in report.comparisons] == [2, 2]
    assert not logs()


def test_wrong_options(run: Run, tiny: Path) -> None:
    assert_one_line_error(run("tune", "--target", tiny, "--minutes", 0), 2, "minutes=0")
    assert_one_line_error(run("tune", "--target", tiny, "--scheme", "best"), 2, "best")
    assert_one_line_error(run("tune", "--target", "no-such-model"), 2, "no-such-model")
