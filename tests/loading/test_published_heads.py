"""Published draft heads are recognised, fetched and checked against their target."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mcsd
from mcsd.errors import UnsupportedModel, VocabularyMismatch
from mcsd.loading.load import LoadedModel, load_draft
from mcsd.loading.published_heads import is_head, load_head
from mcsd.models import BoundHead
from support import eagle
from support.eagle import VARIANTS, Published
from support.tiny import tiny

SPECFORGE, SPECULATORS, EAGLE = Published("specforge"), Published("speculators"), VARIANTS[-2]


@pytest.mark.parametrize("published", VARIANTS, ids=str)
def test_a_head_is_recognised_and_drafts(published: Published, tmp_path: Path) -> None:
    """By the name of a folder, in the engine: the text at temperature 0 is that of plain decoding."""
    published.write(tmp_path)
    assert is_head(tmp_path)
    target = eagle.target()
    params = mcsd.SamplingParams(temperature=0, max_new_tokens=12)
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    plain = mcsd.Engine(target, tree="none", max_batch=2, max_length=64).generate(prompts, params)
    head = load_draft(tmp_path, LoadedModel(target, None))
    drafted = mcsd.Engine(target, head, tree="2x2x1", max_batch=2, max_length=64).generate(prompts, params)
    assert [done.token_ids for done in drafted] == [done.token_ids for done in plain]
    assert sum(done.stats.draft_tokens for done in drafted) > 0


def test_a_head_drafts_for_an_engine_that_loads_both(tmp_path: Path) -> None:
    eagle.target_network().save_pretrained(tmp_path / "target")
    SPECULATORS.write(tmp_path / "head")
    engine = mcsd.Engine.load(str(tmp_path / "target"), draft=str(tmp_path / "head"), tree="2x1", dtype="bfloat16")
    (done,) = engine.generate([[3, 1, 4]], mcsd.SamplingParams(max_new_tokens=8, seed=1))
    assert len(done.token_ids) == 8


def test_models_of_one_layer_are_no_heads(tmp_path: Path) -> None:
    network = tiny("llama")
    network.config.num_hidden_layers = 1
    network.model.layers = network.model.layers[:1]
    network.save_pretrained(tmp_path)
    assert not is_head(tmp_path)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    for published in (SPECFORGE, EAGLE):
        folder = tmp_path / published.format
        tensors = published.write(folder)
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        with pytest.raises(UnsupportedModel, match=r"pickle.*save_file"):
            load_head(folder, eagle.target())
        # The way of the message.
        save_file(torch.load(folder / "pytorch_model.bin", weights_only=True), folder / "model.safetensors")
        assert load_head(folder, eagle.target()).config.kind == ("eagle3" if published == SPECFORGE else "eagle")


def test_a_head_of_another_target_is_refused(tmp_path: Path) -> None:
    """Of another hidden size, vocabulary or number of layers."""
    from mcsd.models import TransformersModel

    SPECFORGE.write(tmp_path)
    with pytest.raises(VocabularyMismatch, match="96"):
        load_draft(tmp_path, LoadedModel(TransformersModel(tiny("llama")), None))
    target = TransformersModel(eagle.target_network(3))
    with pytest.raises(UnsupportedModel, match="layers 0 to 2"):
        BoundHead(load_head(tmp_path, eagle.target()), target, "head")
    wide = Published("specforge", size=64)
    wide.write(tmp_path / "wide")
    with pytest.raises(UnsupportedModel, match="embeddings of 64"):
        load_draft(tmp_path / "wide", LoadedModel(eagle.target(), None))


def test_a_head_on_the_hub_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the files of a hub id, those of a head; the hub's client is replaced by a copy of a folder."""
    SPECULATORS.write(tmp_path)
    asked: list[list[str]] = []

    def fetch(name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        assert (name, local_files_only) == ("org/head", True)
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr("mcsd.loading.published_heads.hub_answers", lambda: False)
    assert isinstance(load_draft("org/head", LoadedModel(eagle.target(), None)), BoundHead)
    assert asked == [["config.json"], ["config.json", "*.safetensors"]]
