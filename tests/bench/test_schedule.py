"""Systems are interleaved, each answers everything, none is always first; options that are refused."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mcsd.bench import Experiment, System, grid, paper
from mcsd.bench.schedule import BenchJob, schedule_jobs
from mcsd.errors import InvalidOption, InvalidTree, UnknownScheme

SIZES = {"a": 4, "b": 3}


def experiment(**changed: Any) -> Experiment:
    systems = grid(["2x1", "2x2x1"], ["mcss-wor", "mcss"], ["single", "naive", "assisted"])
    return Experiment(**{"systems": tuple(systems), "repeats": 2, **changed})


def cell(job: BenchJob) -> tuple[Any, ...]:
    return job.prompts, job.numbers, job.temperature, job.repeat


def test_systems_are_interleaved_on_each_prompt() -> None:
    jobs = schedule_jobs(experiment(temperatures=(1.0,)), SIZES)
    names = [system.name for system in experiment().systems]
    assert len(names) == 9
    for start in range(0, len(jobs), 9):
        group = jobs[start : start + 9]
        assert len({cell(job) for job in group}) == 1
        assert sorted(job.system.name for job in group) == sorted(names)
        assert len({job.seeds for job in group}) == 1
    # Each is first equally often, within one.
    first = Counter(job.system.name for job in jobs[::9])
    assert len(jobs) == 9 * 7 * 2
    assert set(first) == set(names)
    assert max(first.values()) - min(first.values()) <= 1


def test_prompt_sets_alternate_and_repeats_have_seeds_of_their_own() -> None:
    jobs = schedule_jobs(experiment(temperatures=(0.0,)), SIZES)
    order = list(dict.fromkeys((job.repeat, job.prompts, job.numbers[0]) for job in jobs))
    assert order[:4] == [(0, "a", 0), (0, "b", 0), (0, "a", 1), (0, "b", 1)]
    assert {job.repeat for job in jobs[: len(jobs) // 2]} == {0}
    assert len({job.key for job in jobs}) == len(jobs)
    seeds = {(job.repeat, job.numbers): job.seeds for job in jobs}
    assert len(set(seeds.values())) == len(seeds)


def test_at_temperature_0_one_scheme_stands_for_all() -> None:
    names = [system.name for system in experiment().systems_at(0.0, 1)]
    assert names == ["plain", "assisted", "chain:3 mcss-wor", "2x1 mcss-wor", "2x2x1 mcss-wor"]
    assert "2x1 naive" in [system.name for system in experiment().systems_at(0.5, 1)]


def test_batches_are_full_and_transformers_has_none() -> None:
    jobs = schedule_jobs(experiment(batch_sizes=(2,), temperatures=(1.0,), repeats=1), SIZES)
    assert {(job.prompts, job.numbers) for job in jobs} == {("a", (0, 1)), ("a", (2, 3)), ("b", (0, 1))}
    assert "assisted" not in {job.system.name for job in jobs}
    with pytest.raises(InvalidOption, match="batches of 4, and prompts 'b' are 3"):
        schedule_jobs(experiment(batch_sizes=(4,)), SIZES)


def test_a_tree_that_is_a_baseline_too_runs_once() -> None:
    systems = grid(["chain:2", "none"], ["mcss-wor"], ["plain", "single"])
    assert [(system.name, system.role) for system in systems] == [("plain", "plain"), ("chain:2 mcss-wor", "single")]


def test_the_paper_has_its_experiments() -> None:
    names = [system.name for system in paper(tuned=True)]
    assert names[:4] == ["plain", "generate", "assisted", "chain:3 mcss-wor"]
    assert {"4x2x2x1 mcss-wor", "2x2x1 mcss", "2x2x1 naive", "2x2x1 mcss-wor tuned"} <= set(names)
    assert "assisted" not in [system.name for system in paper(assisted=False)]
    Experiment(tuple(paper()))


def test_baselines_outside_the_engine_run_in_batches_of_one() -> None:
    systems = grid(["2x1"], ["mcss-wor"], ["lookup", "generate", "assisted"], peers=["other"])
    names = ["plain", "generate", "lookup", "assisted", "2x1 mcss-wor", "other"]
    assert [system.name for system in systems] == names
    subject = Experiment(tuple(systems))
    assert [system.name for system in subject.systems_at(0.0, 1)] == names
    assert [system.name for system in subject.systems_at(1.0, 2)] == ["plain", "2x1 mcss-wor"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"repeats": 1001}, "repeats=1001"),
        ({"seed": -1}, "seed=-1"),
        ({"temperatures": (float("nan"),)}, "temperatures"),
        ({"temperatures": (1.0, 1.0)}, "one twice"),
        ({"temperatures": ()}, "none"),
        ({"batch_sizes": (0,)}, "batch_sizes"),
        ({"systems": (System("multi", "draft", "2x1", "mcss"),)}, "no plain decoding"),
    ],
)
def test_wrong_experiments(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidOption, match=said):
        experiment(**changed)


def test_two_trees_of_one_name(tmp_path: Path) -> None:
    files = [tmp_path / folder / "mine.json" for folder in "ab"]
    for file, parents in zip(files, ("[-1, -1]", "[-1, 0]"), strict=True):
        file.parent.mkdir()
        file.write_text(parents)
    with pytest.raises(InvalidOption, match="have the same name"):
        grid([str(file) for file in files], ["mcss-wor"], [])
    files[1].write_text("[-1, -1]")
    assert len(grid([str(file) for file in files], ["mcss-wor"], [])) == 2
    # Other words for the same tree.
    assert [system.name for system in grid(["2x1", "parents:-1,-1,0,1"], ["mcss"], [])] == ["plain", "2x1 mcss"]


def test_wrong_grids() -> None:
    for peer in ("", "plain", "2x1 mcss"):
        with pytest.raises(InvalidOption, match=f"peer '{peer}' has the name of another system"):
            grid(["2x1"], ["mcss"], [], peers=[peer])
    with pytest.raises(InvalidOption, match="baseline 'fast'"):
        grid(["2x1"], ["mcss"], ["fast"])
    with pytest.raises(InvalidTree, match="2y"):
        grid(["2y"], ["mcss"], [])
    with pytest.raises(UnknownScheme, match="best"):
        grid(["2x1"], ["best"], [])
    with pytest.raises(InvalidTree, match="supports chains"):
        grid(["2x1"], ["block"], [])
