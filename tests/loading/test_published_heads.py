"""Published draft heads are recognised, checked against their target, and refused by name if they cannot be run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mcsd
from mcsd.errors import McsdError, UnsupportedModel, VocabularyMismatch, WeightsCorrupt
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


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | changes))

    return change


def change_layer(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        fields["transformer_layer_config"] |= changes
        (folder / "config.json").write_text(json.dumps(fields))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = SPECULATORS.tensors()
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return write


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def spoil(name: str, index: int, value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[index] = value

    return change_tensors(change)


BROKEN: list[tuple[Callable[[Path], None], type[McsdError], str]] = [
    (truncate, WeightsCorrupt, "cannot be read"),
    (lambda folder: (folder / "model.safetensors").write_text("no tensors") and None, WeightsCorrupt, "cannot be read"),
    (spoil("d2t", -1, 21), WeightsCorrupt, "outside of a vocabulary"),
    (spoil("d2t", 3, -4), WeightsCorrupt, "outside of a vocabulary"),
    (spoil("d2t", 3, 1 << 62), WeightsCorrupt, "outside of a vocabulary"),
    (spoil("d2t", 3, 0), WeightsCorrupt, "ascending"),
    (spoil("norm.weight", 3, torch.nan), WeightsCorrupt, "NaN"),
    (spoil("fc.weight", 9, torch.inf), WeightsCorrupt, "NaN or infinite"),
    (change_tensors(lambda tensors: tensors.pop("d2t")), WeightsCorrupt, "d2t.*missing"),
    (change_tensors(lambda tensors: tensors.pop("lm_head.weight")), WeightsCorrupt, "missing: lm_head"),
    (change_tensors(lambda tensors: tensors.pop("layers.0.mlp.up_proj.weight")), WeightsCorrupt, "missing.*up_proj"),
    (
        change_tensors(lambda tensors: tensors.update({"layers.0.self_attn.sinks": torch.zeros(4)})),
        WeightsCorrupt,
        "another architecture.*sinks",
    ),
    (change_tensors(lambda tensors: tensors.update({"d2t": torch.zeros(3)})), WeightsCorrupt, "d2t has the shape"),
    (change_layer(hidden_size=64), WeightsCorrupt, "has the shape"),
    (change_layer(hidden_size="wide"), WeightsCorrupt, "cannot be read"),
    (change_layer(num_attention_heads=0), WeightsCorrupt, "cannot be read"),
    (change_layer(num_hidden_layers=1 << 40), WeightsCorrupt, "cannot be read"),
    (change_layer(vocab_size=1 << 40), WeightsCorrupt, "cannot be read"),
    (change_config(draft_vocab_size=1 << 40), WeightsCorrupt, "vocab_size"),
    (change_config(eagle_aux_hidden_state_layer_ids=["a", "b", "c"]), WeightsCorrupt, "hidden_layers"),
    (change_config(transformer_layer_config=None), WeightsCorrupt, "cannot be read"),
    (change_config(fc_norm=True), WeightsCorrupt, "missing"),
    (change_config(speculators_model_type="peagle"), UnsupportedModel, "several positions at once"),
    (change_config(speculators_model_type="dflash"), UnsupportedModel, "dflash"),
    (change_layer(hidden_act="gelu"), UnsupportedModel, "gelu"),
    (change_layer(model_type="gpt2"), UnsupportedModel, "gpt2"),
    (change_layer(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), UnsupportedModel, "dynamic"),
    (change_layer(quantization_config={"quant_method": "fp8"}), UnsupportedModel, "quantized"),
    (
        change_layer(model_type="qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=0),
        UnsupportedModel,
        "sliding window",
    ),
    (change_config(eagle_aux_hidden_state_layer_ids=[2, 4, 8]), UnsupportedModel, "layers 0 to 7"),
    (change_config(eagle_aux_hidden_state_layer_ids=[-1, 4, 5]), UnsupportedModel, "layers 0 to 7"),
    (change_layer(vocab_size=61), VocabularyMismatch, "61 tokens.*60"),
]


@pytest.mark.parametrize("case", range(len(BROKEN)))
def test_a_head_that_cannot_be_run_is_refused_by_name(case: int, tmp_path: Path) -> None:
    change, error, reason = BROKEN[case]
    SPECULATORS.write(tmp_path)
    change(tmp_path)
    with pytest.raises(error, match=reason) as raised:
        load_draft(tmp_path, LoadedModel(eagle.target(), None))
    assert "\n" not in str(raised.value)
    assert raised.value.hint


def test_a_head_of_another_architecture_is_refused(tmp_path: Path) -> None:
    SPECFORGE.write(tmp_path)
    change_config(architectures=["DeepseekV2ForCausalLMEagle3"])(tmp_path)
    with pytest.raises(UnsupportedModel, match="DeepseekV2ForCausalLMEagle3"):
        load_head(tmp_path, eagle.target())
    change_config(architectures=["LlamaForCausalLMEagle3"], eagle_config={"use_aux_hidden_state": False})(tmp_path)
    with pytest.raises(UnsupportedModel, match="last hidden states only"):
        load_head(tmp_path, eagle.target())


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
