"""A whole experiment: what it leaves on disk, how it goes on after a break, what it refuses."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mcsd
from bench.conftest import PROMPTS, tables
from mcsd.bench import Experiment, Models, bench
from mcsd.bench.contestants import Contestants
from mcsd.bench.experiment import TUNED
from mcsd.bench.grid import grid
from mcsd.bench.measure import measure
from mcsd.bench.plan import plan
from mcsd.errors import EmptyPrompt, InvalidOption, InvalidParameter, MissingPackage, PromptTooLong

FILES = {
    *("manifest.json", "requests.jsonl", "acceptance.jsonl", "attention.jsonl"),
    *("summary.csv", "acceptance.csv", "attention.csv", "report.html", "figures"),
}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_everything_is_measured_and_written(models: Models, experiment: Experiment, tmp_path: Path) -> None:
    results = bench(models, PROMPTS, experiment, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"acceptance", "speedup", "steps", "attention"}
    requests = read(tmp_path / "requests.jsonl")
    names = [system.name for system in experiment.systems]
    assert names == [
        *("plain", "chain:2 mcss-wor", "2x1 mcss-wor", "auto mcss-wor", "2x1 naive", "auto naive"),
    ]
    # Four at temperature 0, where one scheme stands for all.
    assert len(requests) == 6 * (4 + 6)
    assert all(len(line["token_ids"][0]) == 6 for line in requests)
    assert all(line["seconds"] >= sum(line["parts"].values()) * 0.9 for line in requests)
    table = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert len(table) == 3 * (4 + 6) == len(results.speeds)
    assert {row["prompts"] for row in table} == {"one", "other", "all"}
    assert {row["system"] for row in table} == set(names)
    accepted = read(tmp_path / "acceptance.jsonl")
    assert len(accepted) == 6 * (1 + 3)
    assert {row["tree"] for row in read(tmp_path / "attention.jsonl")} == {"2x1"}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["versions"]["torch"]
    assert manifest["machine"]["processor"]
    assert str(Path.home()) not in json.dumps(manifest)


def test_a_request_is_what_the_engine_says(models: Models, experiment: Experiment, tmp_path: Path) -> None:
    measure(models, PROMPTS, experiment, tmp_path, 2048)
    lines = [line for line in read(tmp_path / "requests.jsonl") if line["system"] == "2x1 mcss-wor"]
    target, draft = tables()
    for line in lines:
        (prompt,) = (PROMPTS[line["prompts"]][number] for number in line["numbers"])
        engine = mcsd.Engine(target, draft, tree="2x1", max_length=16)
        params = mcsd.SamplingParams(temperature=line["temperature"], max_new_tokens=6, seed=line["seeds"][0])
        (done,) = engine.generate([prompt], params)
        assert line["token_ids"] == [list(done.token_ids)]
        assert line["target_calls"] == [done.stats.target_calls]
        assert line["histogram"] == list(done.stats.acceptance_histogram)
    assert len({tuple(line["token_ids"][0]) for line in lines}) > 1


def test_the_first_answer_is_not_counted(models: Models, experiment: Experiment) -> None:
    contestants = Contestants(models, PROMPTS, 6, 1)
    made: list[Any] = []
    contestants._answer = lambda job, new: made.append((job.key, new))  # type: ignore[method-assign,assignment,return-value,func-returns-value]
    jobs = plan(experiment, {"one": 3})
    for job in jobs:
        contestants.run(job)
    warm = len({(job.system.name, job.temperature) for job in jobs})
    assert len(made) == len(jobs) + warm
    assert made[0] == made[1]


def test_batches(models: Models, tmp_path: Path) -> None:
    systems = tuple(grid(["2x1"], ["mcss-wor"], []))
    results = measure(models, PROMPTS, Experiment(systems, (1.0,), (1, 3), 6), tmp_path, 2048)
    together = [line for line in read(tmp_path / "requests.jsonl") if len(line["numbers"]) == 3]
    assert [line["prompts"] for line in together] == ["one", "one", "other", "other"]
    alone = {
        (line["system"], line["prompts"], line["numbers"][0]): line["token_ids"][0]
        for line in read(tmp_path / "requests.jsonl")
        if len(line["numbers"]) == 1
    }
    # The same seeds, so the same texts.
    for line in together:
        for number, text in zip(line["numbers"], line["token_ids"], strict=True):
            assert text == alone[line["system"], line["prompts"], number]
    assert {row.batch for row in results.speeds} == {1, 3}


def test_two_drafts(experiment: Experiment, tmp_path: Path) -> None:
    target, draft = tables()
    systems = tuple(grid(["2x1"], ["mcss-wor"], [], tuned=True))
    # Nothing drafts as well as the target itself.
    models = Models(target, None, {"draft": draft, TUNED: target})
    results = measure(models, PROMPTS, replace(experiment, systems=systems, temperatures=(1.0,)), tmp_path, 2048)
    rates = {row.system: row.draft_acceptance_rate for row in results.speeds if row.prompts == "all"}
    assert rates["2x1 mcss-wor"] is not None
    assert rates["2x1 mcss-wor tuned"] is not None
    assert rates["2x1 mcss-wor tuned"] > rates["2x1 mcss-wor"]
    tuned = [row for row in results.acceptances if row.draft == TUNED and row.scheme == "mcss-wor"]
    assert all(row.within[0].value == 1.0 for row in tuned)


class Killed(BaseException):
    """What no code catches."""


@pytest.mark.parametrize("after", [30, 65, 73])
def test_it_goes_on_after_a_break(after: int, models: Models, experiment: Experiment, tmp_path: Path) -> None:
    """Broken off in the middle of requests, of acceptance, of attention: what was done is not done again."""
    shown = 0

    def show(line: str) -> None:
        nonlocal shown
        shown += 1
        if shown == after:
            raise Killed

    with pytest.raises(Killed):
        measure(models, PROMPTS, experiment, tmp_path, 2048, show=show)
    logs = {path: path.read_text() for path in tmp_path.glob("*.jsonl")}
    assert logs
    measure(models, PROMPTS, experiment, tmp_path, 2048)
    for path, text in logs.items():
        assert path.read_text().startswith(text)
    requests = read(tmp_path / "requests.jsonl")
    assert len(requests) == 60
    assert len({json.dumps([line[name] for name in KEY]) for line in requests}) == 60
    assert len(read(tmp_path / "acceptance.jsonl")) == 24
    done = {path: path.read_text() for path in tmp_path.glob("*.jsonl")}
    measure(models, PROMPTS, experiment, tmp_path, 2048)
    assert {path: path.read_text() for path in tmp_path.glob("*.jsonl")} == done


KEY = ("system", "prompts", "numbers", "temperature", "repeat")


def test_two_at_once_are_kept_apart(models: Models, experiment: Experiment, tmp_path: Path) -> None:
    def again(line: str) -> None:
        with pytest.raises(InvalidOption, match="being written by another process"):
            measure(models, PROMPTS, experiment, tmp_path, 2048)
        raise Killed

    with pytest.raises(Killed):
        measure(models, PROMPTS, experiment, tmp_path, 2048, show=again)
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json"}


def test_another_experiment_needs_another_folder(models: Models, experiment: Experiment, tmp_path: Path) -> None:
    def killed(line: str) -> None:
        raise Killed

    with pytest.raises(Killed):
        measure(models, PROMPTS, experiment, tmp_path, 2048, show=killed)
    with pytest.raises(InvalidOption, match=r"was begun with experiment\.seed=0, not 1"):
        measure(models, PROMPTS, replace(experiment, seed=1), tmp_path, 2048)
    with pytest.raises(InvalidOption, match=r"was begun with prompts\.one\."):
        measure(models, {"one": [[1]]}, experiment, tmp_path, 2048)
    with pytest.raises(InvalidOption, match="was begun with weights="):
        measure(models, PROMPTS, experiment, tmp_path, 2048, about={"weights": {"target": "x"}})


def test_prompts_that_cannot_be(models: Models, experiment: Experiment, tmp_path: Path) -> None:
    for prompts in ({}, {"one": []}):
        with pytest.raises(EmptyPrompt):
            bench(models, prompts, experiment, tmp_path / "a")
    with pytest.raises(PromptTooLong):
        bench(models, {"one": [[1] * 11]}, experiment, tmp_path / "b", max_length=16)
    with pytest.raises(InvalidOption, match="no room"):
        bench(models, PROMPTS, experiment, tmp_path / "c", max_length=6)
    with pytest.raises(InvalidParameter, match="no tokenizer"):
        bench(models, {"one": ["text"]}, experiment, tmp_path / "d")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_nothing_is_begun(
    models: Models, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingPackage, match="matplotlib") as caught:
        bench(models, PROMPTS, experiment, tmp_path / "out")
    assert "mcsd[bench]" in caught.value.hint
    assert not list(tmp_path.iterdir())
