"""EAGLE-3 heads that start from heads of kind "mcsd"."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mcsd
from mcsd.distill import Callbacks, DistillOptions, distill, trainer
from mcsd.distill.batches import Batch, collate
from mcsd.distill.converted_head import converted_head, converted_layers
from mcsd.distill.corpus import Record
from mcsd.distill.head_learner import HeadLearner
from mcsd.distill.losses import LOSS_FUNCTIONS
from mcsd.distill.teacher import Teacher, most_frequent_tokens
from mcsd.errors import InvalidOption
from mcsd.loading.load import LoadedModel
from mcsd.loading.published_heads import load_head
from mcsd.models.draft_head import DraftHead
from mcsd.models.prefill import hidden_states
from support import eagle

SILENT = Callbacks(lambda tokens: None, lambda report: None)
LAYERS = (10, 20, 29)
LEVELS = 3


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("target")
    eagle.target_network().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def given(target: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("given") / "head"
    distill(options(target, out, kind="head", vocab=40), SILENT)
    return out


def options(target: str, out: Path, **changes: Any) -> DistillOptions:
    known = {"target": target, "out": out, "kind": "eagle3", "steps": 4, "tokens": 1500, "batch": 16, "seed": 5}
    return DistillOptions(**(known | changes))


def texts_of(smollm2: LoadedModel, questions: list[str]) -> Batch:
    """Answers of the target at temperature 0.7 with its hidden states, the last ones last; positions of answers."""
    engine = mcsd.Engine(smollm2.model, None, smollm2.tokenizer, tree="none", max_batch=len(questions))
    prompts = [engine.chat_tokens([{"role": "user", "content": question}]) for question in questions]
    done = engine.generate(prompts, mcsd.SamplingParams(temperature=0.7, max_new_tokens=64, seed=3))
    texts = [torch.tensor([*prompt, *completion.token_ids]) for prompt, completion in zip(prompts, done, strict=True)]
    records = [
        Record(index, text, torch.empty(len(text), 0), len(prompt))
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    compute = partial(hidden_states, smollm2.model, hidden_layers=(*LAYERS, -1))
    return collate(records, sum(map(len, texts)), 0, torch.Generator().manual_seed(0), compute)


def acceptance(head: DraftHead, teacher: Teacher, batch: Batch) -> list[float]:
    """Of one candidate at temperature 1, for each level of the tree."""
    p, _ = teacher.distribution(batch)
    with torch.no_grad():
        levels = HeadLearner(head, teacher, LOSS_FUNCTIONS["kl"], LEVELS, is_trained=True, sample=batch).draft(batch)
    return [torch.minimum(p, level.exp()).sum(-1).mean().item() for level in levels]


def test_the_default_draft_of_smollm2_is_nearly_as_good_as_an_eagle3_head(smollm2: LoadedModel) -> None:
    """Before training, on answers to other questions than those that its weights are fitted to."""
    given = load_head("smollm2-135m-head", smollm2.model)
    assert given is not None
    given = given.float()
    teacher = Teacher(smollm2.model, given.vocabulary)
    topics = ["the moon", "bread", "rivers", "chess", "bees", "Rome", "glass", "sleep"]
    texts = texts_of(smollm2, [f"{ask} {topic}." for topic in topics for ask in ("Explain", "Tell a story about")])
    assert converted_layers(given, smollm2.model.num_layers) == LAYERS
    head = converted_head(given, LAYERS, teacher, texts)
    others = texts_of(smollm2, ["What is a volcano?", "How do I learn to swim?", "Describe a market.", "Who was Bach?"])
    size = given.config.hidden_size
    of_given = torch.cat([others.hidden_states[..., : 2 * size], others.hidden_states[..., -size:]], dim=-1)
    before = acceptance(given, teacher, Batch(others.tokens, of_given, others.positions))
    after = acceptance(head, teacher, others)
    assert all(new > 0.7 * old for new, old in zip(after, before, strict=True))


def test_it_is_trained_and_drafts(target: str, given: Path, tmp_path: Path) -> None:
    report = distill(options(target, tmp_path / "out", init=str(given), vocab=30), SILENT)
    assert report.step == 4
    head = load_head(tmp_path / "out", eagle.target())
    assert head is not None
    assert (head.config.kind, head.config.hidden_layers, len(head.vocabulary)) == ("eagle3", (2, 5, 7), 30)
    assert set(head.vocabulary.tolist()) < set(vocabulary(given).tolist())
    params = mcsd.SamplingParams(temperature=0, max_new_tokens=40)
    texts = [
        mcsd.Engine.load(target, draft, tree=tree, dtype="float32").generate([[0, 4, 9], [3]], params)
        for draft, tree in ((tmp_path / "out", "2x2"), (None, "none"))
    ]
    assert [done.token_ids for done in texts[0]] == [done.token_ids for done in texts[1]]
    assert sum(done.stats.accepted_tokens for done in texts[0]) > 0


def test_without_vocab_it_keeps_the_vocabulary(target: str, given: Path, tmp_path: Path) -> None:
    distill(options(target, tmp_path / "out", init=str(given), steps=1), SILENT)
    assert torch.equal(vocabulary(tmp_path / "out"), vocabulary(given))


def vocabulary(folder: Path) -> Tensor:
    head = load_head(folder, eagle.target())
    assert head is not None
    return head.vocabulary


def test_a_draft_vocabulary_has_the_most_frequent_of_some_tokens() -> None:
    """End-of-sequence tokens come first, where they are among them."""
    text = Record(0, torch.tensor([6, 4, 4, 2, 2, 2, 6, 6, 6]), torch.empty(9, 0), 0)
    tokens = torch.tensor([1, 4, 6, 9])
    assert most_frequent_tokens([text], 2, tokens, frozenset()).tolist() == [4, 6]
    assert most_frequent_tokens([text], 2, tokens, frozenset({9, 50})).tolist() == [6, 9]


class StopError(Exception):
    """Interrupts the run."""


def test_interrupted_training_resumes(
    target: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a checkpoint at every step, the head is bit for bit that of an uninterrupted run."""
    for name, value in (("SAVE_SECONDS", -1.0), ("_SAVING", float("inf")), ("_MEASURING", float("inf"))):
        monkeypatch.setattr(trainer, name, value)
    distill(options(target, tmp_path / "whole", init=str(given)), SILENT)

    def stop(report: trainer.TrainingReport) -> None:
        raise StopError

    changes = {"init": str(given), "data": tmp_path / "whole"}
    with pytest.raises(StopError):
        distill(options(target, tmp_path / "out", **changes), Callbacks(SILENT.writing, stop))
    steps: list[int] = []
    distill(options(target, tmp_path / "out", **changes), Callbacks(SILENT.writing, lambda r: steps.append(r.step)))
    assert steps == [2, 3, 4]
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_a_head_of_several_layers_is_refused(target: str, tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    distill(options(target, deep, kind="head", layers=2, vocab=40, steps=1), SILENT)
    with pytest.raises(InvalidOption, match="2 decoder layers"):
        distill(options(target, tmp_path / "out", init=str(deep)), SILENT)
