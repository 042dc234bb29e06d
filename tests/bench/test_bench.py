"""A whole experiment: its files on disk, how it resumes, and its errors."""

import csv
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mcsd
from mcsd.bench import BenchModels, Experiment, bench
from mcsd.bench.experiment import TUNED
from mcsd.bench.grid import grid
from mcsd.bench.measure import measure
from mcsd.bench.peers import running_peers
from mcsd.bench.runners import JobRunner
from mcsd.bench.schedule import schedule_jobs
from mcsd.bench.transformers_baselines import TransformersBaselines
from mcsd.errors import EmptyPrompt, InvalidOption, InvalidParameter, PromptTooLong
from mcsd.models import TransformersModel
from support.tables import PROMPTS, tables
from support.tiny import tiny

FILES = {
    *("manifest.json", "requests.jsonl", "acceptance.jsonl", "attention.jsonl"),
    *("summary.csv", "acceptance.csv", "attention.csv", "report.html", "figures"),
}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_everything_is_measured_and_written(models: BenchModels, experiment: Experiment, tmp_path: Path) -> None:
    results = bench(models, PROMPTS, experiment, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"speedup", "steps", "acceptance", "attention"}
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


def test_a_record_is_what_the_engine_reports(models: BenchModels, experiment: Experiment, tmp_path: Path) -> None:
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


def test_the_warm_up_is_not_counted(models: BenchModels, experiment: Experiment) -> None:
    runner = JobRunner(models, PROMPTS, 6, 1)
    answered: list[Any] = []
    runner._answer = lambda job, new: answered.append((job.key, new))  # type: ignore[method-assign,assignment,return-value,func-returns-value]
    jobs = schedule_jobs(experiment, {"one": 3})
    for job in jobs:
        runner.run(job)
    warm = len({(job.system.name, job.temperature) for job in jobs})
    assert len(answered) == len(jobs) + warm
    assert answered[0] == answered[1]


def test_batches(models: BenchModels, tmp_path: Path) -> None:
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
    models = BenchModels(target, None, {"draft": draft, TUNED: target})
    results = measure(models, PROMPTS, replace(experiment, systems=systems, temperatures=(1.0,)), tmp_path, 2048)
    rates = {row.system: row.draft_acceptance_rate for row in results.speeds if row.prompts == "all"}
    assert rates["2x1 mcss-wor"] is not None
    assert rates["2x1 mcss-wor tuned"] is not None
    assert rates["2x1 mcss-wor tuned"] > rates["2x1 mcss-wor"]
    tuned = [row for row in results.acceptances if row.draft == TUNED and row.scheme == "mcss-wor"]
    assert all(row.within[0].value == 1.0 for row in tuned)


class Killed(BaseException):
    """No code catches it."""


@pytest.mark.parametrize("after", [30, 65, 73])
def test_an_interrupted_run_resumes(after: int, models: BenchModels, experiment: Experiment, tmp_path: Path) -> None:
    """Interrupted during requests, acceptance or attention: what was measured is not measured again."""
    shown = 0

    def progress(line: str) -> None:
        nonlocal shown
        shown += 1
        if shown == after:
            raise Killed

    with pytest.raises(Killed):
        measure(models, PROMPTS, experiment, tmp_path, 2048, progress=progress)
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


def test_two_processes_cannot_share_a_folder(models: BenchModels, experiment: Experiment, tmp_path: Path) -> None:
    def again(line: str) -> None:
        with pytest.raises(InvalidOption, match="being written by another process"):
            measure(models, PROMPTS, experiment, tmp_path, 2048)
        raise Killed

    with pytest.raises(Killed):
        measure(models, PROMPTS, experiment, tmp_path, 2048, progress=again)
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json"}


@pytest.mark.parametrize("version", [None, 2])
def test_a_folder_of_another_format_is_refused(
    version: int | None, models: BenchModels, experiment: Experiment, tmp_path: Path
) -> None:
    measure(models, PROMPTS, experiment, tmp_path, 2048)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest.pop("version") == 3
    if version is not None:
        manifest["version"] = version
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidOption, match="was begun with another version of mcsd") as caught:
        measure(models, PROMPTS, experiment, tmp_path, 2048)
    assert "--out" in caught.value.hint


def test_baselines_that_a_table_cannot_run_are_left_out(models: BenchModels, tmp_path: Path) -> None:
    systems = tuple(grid(["2x1"], ["mcss-wor"], ["plain", "generate", "assisted"]))
    results = bench(models, PROMPTS, Experiment(systems, (1.0,), max_new_tokens=4), tmp_path)
    reason = "transformers does not run this target"
    assert results.left_out == {"generate": reason, "assisted": reason}
    assert {row.system for row in results.speeds} == {"plain", "2x1 mcss-wor"}
    assert all(row.speedup_generate is None for row in results.speeds)
    assert f"generate is left out: {reason}." in (tmp_path / "report.html").read_text()
    # It resumes: the reasons are the same.
    before = (tmp_path / "requests.jsonl").read_text()
    measure(models, PROMPTS, Experiment(systems, (1.0,), max_new_tokens=4), tmp_path, 2048)
    assert (tmp_path / "requests.jsonl").read_text() == before


def test_generate_runs_on_the_network_of_an_object(tmp_path: Path) -> None:
    """A draft that is no model of transformers is fine; it cannot assist."""
    models = BenchModels(TransformersModel(tiny("llama")), None, {"draft": "ngram"})
    systems = tuple(grid(["2x1"], ["mcss-wor"], ["generate", "assisted"]))
    results = measure(models, PROMPTS, Experiment(systems, (0.0,), max_new_tokens=6), tmp_path, 64)
    assert results.left_out == {"assisted": "the draft is not a model of transformers"}
    lines = [line for line in read(tmp_path / "requests.jsonl") if line["prompts"] == "one"]
    assert {line["system"] for line in lines} == {"plain", "generate", "2x1 mcss-wor"}
    # Greedy, so all say the same.
    assert len({json.dumps([line["numbers"], line["token_ids"]]) for line in lines}) == 3
    rows = {row.system: row for row in results.speeds if row.prompts == "all"}
    assert rows["generate"].speedup_generate is not None
    assert rows["generate"].speedup_generate.value == 1.0
    plain = rows["plain"]
    assert plain.speedup_generate is not None
    assert plain.speedup_generate.value == pytest.approx(1 / rows["generate"].speedup.value)


def test_baselines_that_transformers_refuses_or_that_need_batches_of_one() -> None:
    baselines = TransformersBaselines(tiny("llama"), tiny("llama"))
    models = BenchModels(TransformersModel(tiny("llama")), None, {"draft": "ngram"}, baselines)
    systems = grid(["2x1"], ["mcss-wor"], ["generate", "assisted"], peers=["other"])
    assert models.left_out(systems, (1, 4), [1, 2]) == {}
    assert list(models.left_out(systems, (4,), [1, 2])) == ["generate", "assisted", "other"]

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("no\nluck")

    baselines._target.generate = refuse
    assert models.left_out(systems, (1,), [1, 2])["generate"] == "transformers refuses: no luck"


def test_trees_have_short_names_in_all_files(models: BenchModels, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"parents": [-1, -1, 0]}')
    long = "parents:" + ",".join(["-1"] * 9 + ["0"] * 3)
    trees = ["parents:-1,-1,0,1", long, str(tmp_path / "mine.json")]
    systems = grid(trees, ["mcss-wor"], [])
    names = ["2x1", systems[2].name.removesuffix(" mcss-wor"), "mine.json"]
    assert [system.name for system in systems[1:]] == [f"{name} mcss-wor" for name in names]
    assert len(names[1]) < 12
    results = bench(models, PROMPTS, Experiment(tuple(systems), (1.0,), max_new_tokens=2), tmp_path / "out")
    assert [row.tree for row in results.attentions] == names
    assert {line["tree"] for line in read(tmp_path / "out" / "requests.jsonl")} == {"none", *names}
    assert results.manifest["trees"] == {
        **{"none": [], "2x1": [-1, -1, 0, 1], names[1]: [-1] * 9 + [0] * 3, "mine.json": [-1, -1, 0]},
    }
    assert "parents:" not in (tmp_path / "out" / "summary.csv").read_text()


PEER = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    assert set(request) == {"prompt_token_ids", "seed", "temperature", "max_new_tokens"}
    print(json.dumps({"token_ids": request["prompt_token_ids"] * 2, "seconds": 0.5}), flush=True)
"""


def command(tmp_path: Path, source: str) -> str:
    (tmp_path / "peer.py").write_text(source)
    return shlex.join([sys.executable, str(tmp_path / "peer.py")])


def test_a_peer_answers_and_times_itself(models: BenchModels, tmp_path: Path) -> None:
    systems = tuple(grid(["2x1"], ["mcss-wor"], [], peers=["other"]))
    experiment = Experiment(systems, (1.0,), (1, 2), max_new_tokens=6)
    with running_peers({"other": command(tmp_path, PEER)}) as peers:
        results = measure(replace(models, peers=peers), PROMPTS, experiment, tmp_path / "out", 2048)
        process = peers["other"]._process
    assert process.returncode == 0
    lines = [line for line in read(tmp_path / "out" / "requests.jsonl") if line["system"] == "other"]
    # Batches of one only.
    assert [(line["role"], len(line["numbers"]), line["seconds"]) for line in lines] == [("peer", 1, 0.5)] * 6
    assert [line["token_ids"] for line in lines if line["prompts"] == "one"] == [[[1, 2, 1, 2]], [[3, 3]], [[4, 4]]]
    (row,) = (row for row in results.speeds if row.system == "other" and row.prompts == "all")
    assert row.tokens_per_second.value == pytest.approx(16 / 3)
    assert (row.block_efficiency, row.overhead) == (None, None)


@pytest.mark.parametrize("source", ["", "print('hello')", "print('{\"token_ids\": 3}')"])
def test_a_peer_that_gives_no_answer(source: str, models: BenchModels, experiment: Experiment, tmp_path: Path) -> None:
    started = running_peers({"other": command(tmp_path, source)})
    with started as peers, pytest.raises(InvalidOption, match="peer 'other' gave no answer"):
        measure(replace(models, peers=peers), PROMPTS, experiment, tmp_path / "out", 2048)
    with pytest.raises(InvalidOption, match="peer 'other' cannot be started"), running_peers({"other": "/no/such"}):
        pass


def test_another_experiment_needs_another_folder(models: BenchModels, experiment: Experiment, tmp_path: Path) -> None:
    def killed(line: str) -> None:
        raise Killed

    with pytest.raises(Killed):
        measure(models, PROMPTS, experiment, tmp_path, 2048, progress=killed)
    with pytest.raises(InvalidOption, match=r"was begun with experiment\.seed=0, not 1"):
        measure(models, PROMPTS, replace(experiment, seed=1), tmp_path, 2048)
    with pytest.raises(InvalidOption, match=r"was begun with prompts\.one\."):
        measure(models, {"one": [[1]]}, experiment, tmp_path, 2048)
    with pytest.raises(InvalidOption, match="was begun with weights="):
        measure(models, PROMPTS, experiment, tmp_path, 2048, provenance={"weights": {"target": "x"}})


def test_prompts_that_are_wrong(models: BenchModels, experiment: Experiment, tmp_path: Path) -> None:
    for prompts in ({}, {"one": []}):
        with pytest.raises(EmptyPrompt):
            bench(models, prompts, experiment, tmp_path / "a")
    with pytest.raises(PromptTooLong):
        bench(models, {"one": [[1] * 11]}, experiment, tmp_path / "b", max_length=16)
    with pytest.raises(InvalidOption, match="leaves no prompt"):
        bench(models, PROMPTS, experiment, tmp_path / "c", max_length=6)
    with pytest.raises(InvalidParameter, match="needs a tokenizer"):
        bench(models, {"one": ["text"]}, experiment, tmp_path / "d")
    assert not list(tmp_path.iterdir())
