"""A draft head drafts as in training, in any batch and tree."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mcsd
from mcsd import TreeShape
from mcsd.distill.batches import Batch
from mcsd.distill.head_learner import HeadLearner
from mcsd.distill.losses import forward_kl
from mcsd.distill.teacher import Teacher
from mcsd.drafters import HeadDrafter
from mcsd.errors import UnsupportedModel, VocabularyMismatch, WeightsCorrupt
from mcsd.models import BoundHead, DraftHead, TokenLayout, TransformersModel
from mcsd.models.draft_head import HeadConfig
from mcsd.models.prefill import prefill
from mcsd.rng import DRAW, PhiloxStream
from mcsd.sampling import BatchSamplingParams
from mcsd.schemes import SCHEMES
from mcsd.schemes.registry import REGISTRY
from mcsd.testing import TabularModel
from support.tiny import VOCABULARY, tiny

STATES = (1, -1)
SIZE = 40
PROMPTS = [[5, 9, 2, 5, 9], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]


def config(**changes: Any) -> HeadConfig:
    known = {
        "target": "tiny",
        "target_vocab_size": VOCABULARY,
        "hidden_size": 32,
        "hidden_layers": STATES,
        "num_layers": 2,
    }
    return HeadConfig(**(known | {"vocab_size": SIZE} | changes))


@cache
def learner(family: str) -> tuple[TransformersModel, HeadLearner]:
    """A target and a random head for it, with part of the target's vocabulary."""
    target = TransformersModel(tiny(family))
    vocabulary = torch.cat([torch.arange(0, 70, 2), torch.arange(91, 96)]).to(torch.int32)
    torch.manual_seed(3)
    head = DraftHead(config())
    head.vocabulary.copy_(vocabulary)
    sample = Batch(torch.zeros(1, 4, dtype=torch.int64), torch.randn(1, 4, 64), torch.arange(4))
    made = HeadLearner(head, Teacher(target, vocabulary), forward_kl, 2, False, sample)
    for parameter in made.network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    return target, made


def bound(family: str) -> tuple[TransformersModel, BoundHead]:
    target, made = learner(family)
    return target, BoundHead(made.network, target, "head")


def as_trained(family: str, text: list[int]) -> list[torch.Tensor]:
    """q after the last token of a text, ``[K]``, 0, 1, ... steps after the target's last hidden state."""
    target, made = learner(family)
    cache = target.new_cache(1, 64)
    states = prefill(target, cache, cache.add(), text, STATES)
    assert states is not None
    batch = Batch(torch.tensor([text]), states, torch.tensor([len(text) - 1]))
    with torch.no_grad():
        return [draft[0].exp() for draft in made.draft(batch)]


def test_in_a_tree_q_is_that_of_training(family: str) -> None:
    """Sequences of unequal length, three steps with commits: q at each node is that of training on the same path."""
    target, head = bound(family)
    shape = TreeShape.parse("2x2")
    drafter, cache = HeadDrafter(head, 3, 64), target.new_cache(3, 64)
    texts = [list(prompt) for prompt in PROMPTS]
    for prompt in PROMPTS:
        drafter.add(prompt, prefill(target, cache, cache.add(), prompt[:-1], STATES))
    sampling = BatchSamplingParams.of([mcsd.SamplingParams()] * 3, torch.device("cpu"))
    columns = head.vocabulary.tolist()
    for step in range(3):
        random = PhiloxStream(torch.arange(3), torch.full((3,), step), DRAW)
        tree = drafter.draft(texts, shape, SCHEMES["mcss-wor"](), sampling, random)
        assert tree.q is not None
        for row, text in enumerate(texts):
            for node in (-1, 0, 1):
                path = [int(tree.tokens[row, node])] if node >= 0 else []
                expected = as_trained(family, text + path)[len(path)]
                places = torch.tensor([columns.index(token) for token in tree.q.support[row, 1 + node].tolist()])
                torch.testing.assert_close(tree.q.weights[row, 1 + node], expected[places], atol=1e-4, rtol=1e-3)
        # The first sequence accepts no node, the second one, the third two.
        path = torch.tensor([[-1, -1], [1, -1], [0, 3]])
        roots = torch.tensor([[text[-1]] for text in texts])
        output = target.forward(
            torch.cat([roots, tree.tokens], 1), TokenLayout.tree(shape), cache, hidden_layers=STATES
        )
        kept = torch.nn.functional.pad(path + 1, (1, 0))
        counts = (path >= 0).sum(-1)
        cache.commit(kept, counts + 1)
        assert output.hidden is not None
        states = output.hidden.gather(1, kept.clamp(min=0)[..., None].expand(-1, -1, output.hidden.shape[-1]))
        drafter.commit(path, [[], [1], [0, 3]], states)
        for row, text in enumerate(texts):
            text += [int(tree.tokens[row, node]) for node in path[row] if node >= 0] + [11 + step]


def test_sequences_that_end_do_not_change_the_others() -> None:
    target, head = bound("llama")
    params = [mcsd.SamplingParams(seed=i, max_new_tokens=4 + 5 * i) for i in range(6)]
    prompts = [PROMPTS[i % 3] for i in range(6)]
    together = mcsd.Engine(target, head, tree="2x2x1", max_batch=3, max_length=64).generate(prompts, params)
    for i, done in enumerate(together):
        (alone,) = mcsd.Engine(target, head, tree="2x2x1", max_batch=1, max_length=64).generate([prompts[i]], params[i])
        assert done.token_ids == alone.token_ids


@pytest.mark.parametrize("scheme", sorted(mcsd.SCHEMES))
def test_candidates_are_of_its_vocabulary_and_distinct(scheme: str) -> None:
    target, head = bound("qwen2")
    drafter = HeadDrafter(head, 2, 64)
    cache = target.new_cache(2, 64)
    for prompt in PROMPTS[:2]:
        drafter.add(prompt, prefill(target, cache, cache.add(), prompt[:-1], STATES))
    sampling = BatchSamplingParams.of([mcsd.SamplingParams(), mcsd.SamplingParams(temperature=0)], torch.device("cpu"))
    random = PhiloxStream(torch.arange(2), torch.zeros(2, dtype=torch.int64), DRAW)
    shape = TreeShape.parse("4x2x1" if REGISTRY[scheme].max_width is None else "chain:3")
    tree = drafter.draft(PROMPTS[:2], shape, SCHEMES[scheme](), sampling, random)
    assert set(tree.tokens[tree.valid].tolist()) <= set(head.vocabulary.tolist())
    assert tree.q is not None
    assert all(len(set(node.tolist())) == len(node) for row in tree.q.support for node in row)


def test_a_head_is_loaded_as_saved(tmp_path: Path) -> None:
    _, made = learner("llama")
    from mcsd.files import save_tensors, save_text

    save_tensors(tmp_path / "model.safetensors", made.network.state_dict())
    save_text(tmp_path / "config.json", made.network.config.to_json())
    read = DraftHead.load(tmp_path)
    assert read.config == made.network.config
    for name, tensor in made.network.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name])


def test_a_head_of_version_1_is_read(tmp_path: Path) -> None:
    """The draft that comes with the package has it."""
    test_a_head_is_loaded_as_saved(tmp_path)
    expected = DraftHead.load(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields |= {"states": fields.pop("hidden_layers"), "layers": fields.pop("num_layers")}
    fields |= {"vocabulary": fields.pop("vocab_size")}
    assert fields.pop("version") == 2
    (tmp_path / "config.json").write_text(json.dumps(fields))
    old = {"feature_proj": "fuse", "input_proj": "join", "decoder": "body"}
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {
        f"{old.get(m, m)}{dot}{rest}": tensors[f"{m}{dot}{rest}"]
        for m, dot, rest in (name.partition(".") for name in tensors)
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "model.safetensors")
    read = DraftHead.load(tmp_path)
    assert read.config == expected.config
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name])


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"model_type": "mcsd-head"}'),
        ("config.json", '{"model_type": "mcsd-head", "version": 3}'),
        ("config.json", '{"model_type": "mcsd-head", "target": "x", "target_vocab_size": 1e99, "hidden_size": 32}'),
        ("model.safetensors", "no tensors"),
    ],
)
def test_a_broken_head_is_refused(tmp_path: Path, broken: str, text: str) -> None:
    test_a_head_is_loaded_as_saved(tmp_path)
    (tmp_path / broken).write_text(text)
    with pytest.raises(WeightsCorrupt, match="distill"):
        DraftHead.load(tmp_path)


@pytest.mark.parametrize("ids", [[-1, *range(39)], [0, 0, *range(1, 39)], [*range(39), VOCABULARY]])
def test_token_ids_are_checked_before_they_index_anything(tmp_path: Path, ids: list[int]) -> None:
    test_a_head_is_loaded_as_saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"vocabulary": torch.tensor(ids, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsCorrupt, match="vocabulary"):
        DraftHead.load(tmp_path)


@pytest.mark.parametrize(
    ("weight", "reason"), [(torch.full((32, 64), torch.nan), "NaN"), (torch.ones(32, 64).char(), "type int8")]
)
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, weight: torch.Tensor, reason: str) -> None:
    test_a_head_is_loaded_as_saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["input_proj.weight"].shape == weight.shape
    save_file(tensors | {"input_proj.weight": weight}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsCorrupt, match=reason):
        DraftHead.load(tmp_path)


def test_sizes_are_bounded_before_anything_is_allocated() -> None:
    for name in ("hidden_size", "num_layers", "vocab_size", "target_vocab_size"):
        for value in (0, -1, 1 << 40, 2.5, "8"):
            with pytest.raises(ValueError, match=name):
                config(**{name: value})
    with pytest.raises(ValueError, match="hidden_layers"):
        config(hidden_layers=tuple(range(17)))


def test_a_head_of_another_target_is_refused() -> None:
    target = TransformersModel(tiny("llama"))
    with pytest.raises(VocabularyMismatch, match="97"):
        BoundHead(DraftHead(config(target_vocab_size=97)), target, "head")
    with pytest.raises(UnsupportedModel, match="64"):
        BoundHead(DraftHead(config(hidden_size=64)), target, "head")
    with pytest.raises(UnsupportedModel, match="layer 9"):
        BoundHead(DraftHead(config(hidden_layers=(9, -1))), target, "head")
    with pytest.raises(UnsupportedModel, match="no hidden states"):
        BoundHead(DraftHead(config()), TabularModel(torch.full((4, 4), 0.25)), "head")
