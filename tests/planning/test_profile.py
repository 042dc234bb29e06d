"""What is kept between runs, and what the first request of an engine measures."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mcsd
from mcsd.drafters import NgramDrafter
from mcsd.errors import McsdWarning, NonFiniteLogits
from mcsd.loading.load import LoadedModel
from mcsd.models import TransformersModel
from mcsd.planning import Profile, ProfileFile, StepCosts, measure_forwards, profile_file
from mcsd.planning.acceptance import geometric_rates
from mcsd.testing import TabularModel
from mcsd.tree import TreeShape
from support.ngrams import eager_ngram
from support.tiny import tiny

SCHEME = "mcss-wor"
PROFILE = Profile(
    StepCosts(((1, 0.1), (8, 0.25)), ((1, 0.01),), 0.001, 0.002, 0.003, 0.0004),
    geometric_rates(0.7, 0.1),
    geometric_rates(0.6, 0.1),
    TreeShape.parse("2x1"),
    {"races": []},
)


@pytest.fixture
def place(tmp_path: Path) -> ProfileFile:
    return ProfileFile(tmp_path / "profiles" / "pair.json", {"target": "a", "draft": "b"})


def test_a_profile_comes_back_as_it_was(place: ProfileFile) -> None:
    assert place.read(SCHEME) is None
    place.write(PROFILE)
    assert place.read(SCHEME) == PROFILE
    place.write(replace(PROFILE, tree=None))
    assert place.read(SCHEME) == replace(PROFILE, tree=None)
    assert [file.name for file in place.path.parent.iterdir()] == ["pair.json"]


def test_the_profile_of_something_else_is_none(place: ProfileFile) -> None:
    place.write(PROFILE)
    assert ProfileFile(place.path, {"target": "a", "draft": "c"}).read(SCHEME) is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("costs", "target"), []),
        (("costs", "target"), [[4, 0.1], [1, 0.2]]),
        (("costs", "target"), [[1, float("nan")]]),
        (("costs", "target"), [[1, 0.0]]),
        (("costs", "target"), [[0, 1.0]]),
        (("costs", "target"), [[1, 1.0], [2, 0.5]]),
        (("costs", "target"), [[float("inf"), 1.0]]),
        (("costs", "plain"), 10**400),
        (("costs", "plain"), -1),
        (("greedy",), [[0.5]]),
        (("sampled", 0, 0), 1.5),
        (("tree",), [5]),
        (("tree",), [-1] * 5000),
        (("costs",), None),
    ],
)
def test_what_is_no_profile_is_none(place: ProfileFile, path: tuple[Any, ...], value: Any) -> None:
    place.write(PROFILE)
    whole: Any = json.loads(place.path.read_text())
    part = whole
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    place.path.write_text(json.dumps(whole))
    assert place.read(SCHEME) is None
    place.path.write_text(json.dumps(whole)[:40])
    assert place.read(SCHEME) is None


def test_where_it_cannot_be_kept_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(McsdWarning, match="calibrates again"):
        ProfileFile(tmp_path / "file" / "pair.json", {}).try_write("mcss-wor", PROFILE)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_weights_that_are_replaced_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCSD_HOME", str(tmp_path / "home"))
    folder = tmp_path / "model"
    tiny("llama").save_pretrained(folder)
    model = TransformersModel(tiny("llama"), str(folder))

    def path(scheme: str, target: TransformersModel = model) -> Path:
        return profile_file(target, "ngram", scheme).path

    first = path("mcss")
    assert first.parent == tmp_path / "home" / "profiles"
    assert path("mcss") == first
    assert path("mcss-wor") != first
    assert path("mcss", TransformersModel(tiny("llama"), str(folder), precision="int8")) != first
    os.utime(folder / "model.safetensors", (1, 1))
    assert path("mcss") != first


def test_forwards_are_timed_within_the_models_context() -> None:
    class Short(TabularModel):
        max_length = 20

    for batch_sizes in ((1,), (1, 3)):
        curve = measure_forwards(Short(torch.eye(4)), batch_sizes=batch_sizes)
        assert curve[0][0] == 1
        assert all(seconds > 0 for _, seconds in curve)
        assert curve[-1][0] <= 10 * max(batch_sizes)


def test_the_first_request_measures_and_later_engines_know(place: ProfileFile) -> None:
    def engine() -> mcsd.Engine:
        return mcsd.Engine(tiny("llama"), tiny("llama", seed=1), tree="auto", max_length=100, profile=place)

    params = mcsd.SamplingParams(max_new_tokens=30, seed=4)
    first = engine()
    prompts = [[5, 9, 2], [7]]
    texts = first.generate(prompts, params)
    known = place.read(SCHEME)
    assert known is not None
    # The measuring is in nobody's statistics.
    assert all(done.stats.target_calls <= 30 for done in texts)
    # The same seed has the same text: later in the engine, in another one, and alone.
    first.generate([[9]] * 8, mcsd.SamplingParams(max_new_tokens=40))
    assert [done.token_ids for done in first.generate(prompts, params)] == [done.token_ids for done in texts]
    assert engine().generate([prompts[1]], params)[0].token_ids == texts[1].token_ids
    assert place.read(SCHEME) == known


@pytest.mark.parametrize("scheme", sorted(mcsd.SCHEMES))
@pytest.mark.parametrize("draft", ["model", "ngram"])
def test_every_scheme_and_drafter_can_be_automatic(scheme: str, draft: str) -> None:
    proposer = "ngram" if draft == "ngram" else TabularModel(torch.eye(6).roll(1, dims=1))
    engine = mcsd.Engine(TabularModel(torch.eye(6).roll(1, dims=1)), proposer, tree="auto", scheme=scheme, max_batch=2)
    for done in engine.generate([[0]] * 3, mcsd.SamplingParams(temperature=0, max_new_tokens=50)):
        assert done.token_ids == tuple((1 + i) % 6 for i in range(50))


def test_a_short_context_is_enough() -> None:
    engine = mcsd.Engine(tiny("llama"), tiny("llama"), tree="auto", max_length=4)
    (done,) = engine.generate([[1, 2]], mcsd.SamplingParams(temperature=0))
    assert len(done.token_ids) == 2


@pytest.mark.parametrize("broken", ["target", "draft"])
def test_broken_weights_are_named_by_the_request(broken: str, place: ProfileFile) -> None:
    models = {"target": tiny("llama"), "draft": tiny("llama")}
    models[broken].model.norm.weight.data.fill_(float("nan"))
    engine = mcsd.Engine(models["target"], models["draft"], tree="auto", max_length=100, profile=place)
    with pytest.raises(NonFiniteLogits):
        engine.generate([[1, 2]])
    assert place.read(SCHEME) is None


def test_ctrl_c_while_measuring_ends_the_request_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = mcsd.Engine(tiny("llama"), tiny("llama"), tree="auto", max_length=100)
    forward, calls = engine.target.forward, 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.target, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, 2]])
    (done,) = engine.generate([[1, 2]], mcsd.SamplingParams(max_new_tokens=5))
    assert len(done.token_ids) == 5


def test_built_in_prompts_that_are_too_long_are_no_matter(smollm2: LoadedModel) -> None:
    engine = mcsd.Engine(smollm2.model, "ngram", smollm2.tokenizer, tree="auto", max_length=8, max_batch=1)
    waiting = engine.request([5, 6])
    engine.submit(waiting)
    while not waiting.done:
        engine.step()
    assert waiting.completion is not None
    assert len(waiting.tokens) == 6


@pytest.mark.parametrize("draft", ["model", "ngram", "model+ngram"])
def test_a_seed_has_the_text_of_plain_decoding(place: ProfileFile, draft: str) -> None:
    """Whatever else runs and has run, and whatever trees and look-up are used."""
    place.write(PROFILE)
    params = [mcsd.SamplingParams(temperature=0.1, max_new_tokens=90, seed=seed) for seed in range(6)]
    prompts = [[5, 9, 2], [7], [1, 2, 3, 1, 2], [4, 4], [8], [6, 3]]
    drafts: list[Any] = [tiny("llama")] * ("model" in draft) + ["ngram"] * ("ngram" in draft)
    given = drafts if len(drafts) > 1 else drafts[0]
    subject = mcsd.Engine(tiny("llama"), given, tree="auto", max_length=120, max_batch=4, profile=place)
    plain = mcsd.Engine(tiny("llama"), tiny("llama", seed=1), tree="none", max_length=120)
    expected = [done.token_ids for done in plain.generate(prompts, params)]
    subject.calibrate()
    if isinstance(subject.drafter, NgramDrafter):
        subject.drafter.cost = eager_ngram().cost
    first = subject.generate(prompts, params)
    assert [done.token_ids for done in first] == expected
    assert sum(done.stats.accepted_tokens for done in first) > 0
    subject.generate([[9]] * 8, mcsd.SamplingParams(max_new_tokens=80))
    others = [mcsd.SamplingParams(max_new_tokens=40), params[0], mcsd.SamplingParams(temperature=0, max_new_tokens=9)]
    assert subject.generate([[7], prompts[0], [1, 2, 3]], others)[1].token_ids == expected[0]
    assert subject.generate([prompts[5]], params[5])[0].token_ids == expected[5]


@pytest.mark.parametrize(("scheme", "tree"), [("block", [-1, -1, -1]), ("mcss-wor", [-1] * 200)])
def test_a_tree_that_cannot_be_run_is_not_believed(place: ProfileFile, scheme: str, tree: list[int]) -> None:
    place.write(replace(PROFILE, tree=TreeShape(tree)))
    assert place.read(scheme) is None


def test_a_draft_that_no_tree_needs_is_not_looked_for(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    engine = mcsd.Engine.load(str(tmp_path / "model"), "no-such-draft", tree="none")
    assert engine.draft_name == "none"
