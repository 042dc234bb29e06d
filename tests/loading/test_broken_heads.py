"""Folders of published heads that are broken, or not for their target: a named error in one line, before anything large
is allocated."""

import json
from pathlib import Path

import pytest
import torch

import mcsd
from mcsd.errors import McsdError, UnsupportedModel, VocabularyMismatch, WeightsCorrupt
from mcsd.loading.load import LoadedModel, load_draft
from support import eagle
from support.broken_heads import (
    COMMON,
    FORMATS,
    Fault,
    cast,
    config,
    drop,
    layer,
    shards,
    spoil,
    tensors,
    truncate,
    written,
)
from support.eagle import VARIANTS, Published

SPECFORGE, SPECULATORS = FORMATS
HUGE = 10**400
"""An integer that no float can hold."""

YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}

Case = tuple[Fault, type[McsdError], str]

FILES: list[Case] = [
    (truncate, WeightsCorrupt, "cannot be read"),
    (written("no tensors"), WeightsCorrupt, "cannot be read"),
    (written(""), WeightsCorrupt, "cannot be read"),
    (shards(("model-00001-of-00002", lambda index: True)), WeightsCorrupt, "of 2 files there are 1"),
    (shards(("a", lambda index: True), ("b", lambda index: index == 3)), WeightsCorrupt, "in two files"),
    (shards(("a", lambda index: index % 2 == 0)), WeightsCorrupt, "missing"),
    (written("{", "config.json"), WeightsCorrupt, "no JSON object"),
    (written("[1]", "config.json"), WeightsCorrupt, "no JSON object"),
    (written("[" * 100_000, "config.json"), WeightsCorrupt, "no JSON object"),
]

TENSORS: list[Case] = [
    (spoil("d2t", -1, 21), WeightsCorrupt, "outside of a vocabulary"),
    (spoil("d2t", 3, -4), WeightsCorrupt, "outside of a vocabulary"),
    (spoil("d2t", 3, 1 << 62), WeightsCorrupt, "outside of a vocabulary"),
    (spoil("d2t", 3, 0), WeightsCorrupt, "ascending"),
    (cast("d2t", torch.float32), WeightsCorrupt, "d2t is float32"),
    (cast("d2t", torch.bool), WeightsCorrupt, "d2t is bool"),
    (tensors(lambda found: found.update(d2t=torch.zeros(3))), WeightsCorrupt, r"d2t is float32 \[3\]"),
    (spoil("norm.weight", 3, torch.nan), WeightsCorrupt, "NaN"),
    (spoil("fc.weight", 9, torch.inf), WeightsCorrupt, "NaN or infinite"),
    (cast("fc.weight", torch.int8), WeightsCorrupt, "type int8"),
    (drop("d2t"), WeightsCorrupt, "d2t.*missing"),
    (drop("lm_head.weight"), WeightsCorrupt, "missing: lm_head"),
    (drop("mlp.up_proj.weight"), WeightsCorrupt, "missing.*up_proj"),
    (
        tensors(lambda found: found.update({"layers.0.self_attn.sinks": torch.zeros(4)})),
        WeightsCorrupt,
        "another architecture.*sinks",
    ),
]

SIZES: list[Case] = [
    (layer(hidden_size=64), WeightsCorrupt, "has the shape"),
    # Layers of 70 TB, were they allocated.
    (layer(hidden_size=1 << 16, intermediate_size=1 << 22, num_hidden_layers=64), WeightsCorrupt, "missing|the shape"),
    (layer(hidden_size="wide"), WeightsCorrupt, "hidden_size='wide' is not an integer"),
    (layer(hidden_size=32.5), WeightsCorrupt, "hidden_size=32.5 is not an integer"),
    (layer(hidden_size=-32), WeightsCorrupt, "hidden_size=-32 is not an integer"),
    (layer(intermediate_size="48"), WeightsCorrupt, "intermediate_size='48' is not an integer"),
    (layer(num_attention_heads=0), WeightsCorrupt, "num_attention_heads=0"),
    (layer(num_attention_heads=5), WeightsCorrupt, "5"),
    (layer(num_key_value_heads=3), WeightsCorrupt, "cannot share 3"),
    (layer(num_key_value_heads=True), WeightsCorrupt, "num_key_value_heads=True"),
    (layer(head_dim=7), WeightsCorrupt, "7"),
    (layer(vocab_size=1 << 40), WeightsCorrupt, "vocab_size"),
    (layer(vocab_size=float("inf")), WeightsCorrupt, "vocab_size=inf"),
    (layer(vocab_size=61), VocabularyMismatch, "61 tokens.*60"),
    (config(draft_vocab_size=1 << 40), WeightsCorrupt, "vocab_size"),
    (config(draft_vocab_size="40"), WeightsCorrupt, "vocab_size='40'"),
    (config(draft_vocab_size=-40), WeightsCorrupt, "vocab_size=-40"),
    (config(draft_vocab_size=80), WeightsCorrupt, r"d2t is int64 \[40\], not int64 \[80\]"),
    (config(target_hidden_size=-32), WeightsCorrupt, "cannot be read"),
    (config(target_hidden_size=HUGE), WeightsCorrupt, "cannot be read"),
    (config(target_hidden_size="32"), WeightsCorrupt, "cannot be read"),
]

LAYER_IDS: list[Case] = [
    (config(eagle_aux_hidden_state_layer_ids=["a", "b", "c"]), WeightsCorrupt, "hidden_layers"),
    (config(eagle_aux_hidden_state_layer_ids=[2.0, 4.0, 5.0]), WeightsCorrupt, "hidden_layers"),
    (config(eagle_aux_hidden_state_layer_ids=3), WeightsCorrupt, "cannot be read"),
    (config(eagle_aux_hidden_state_layer_ids=[1] * 17), WeightsCorrupt, "1 to 16 layers"),
    (config(eagle_aux_hidden_state_layer_ids=[2, 4]), WeightsCorrupt, "has the shape"),
    (config(eagle_aux_hidden_state_layer_ids=[2, 4, 8]), UnsupportedModel, "layers 0 to 7"),
    (config(eagle_aux_hidden_state_layer_ids=[-1, 4, 5]), UnsupportedModel, "layers 0 to 7"),
    (config(eagle_aux_hidden_state_layer_ids=[HUGE, 4, 5]), WeightsCorrupt, "hidden_layers"),
]

NUMBERS: list[Case] = [
    (layer(rms_norm_eps="small"), WeightsCorrupt, "rms_norm_eps"),
    (layer(rms_norm_eps=float("nan")), WeightsCorrupt, "rms_norm_eps"),
    (layer(rms_norm_eps=-1.0), WeightsCorrupt, "rms_norm_eps"),
    (layer(rope_theta=0), WeightsCorrupt, "rope_theta"),
    (layer(rope_theta=HUGE), WeightsCorrupt, "cannot be read"),
    (layer(rope_scaling=YARN | {"factor": 0}), WeightsCorrupt, "cannot be read"),
    (layer(rope_scaling=YARN | {"factor": "two"}), WeightsCorrupt, "cannot be read"),
    (layer(rope_scaling=YARN | {"original_max_position_embeddings": HUGE}), WeightsCorrupt, "cannot be read"),
    (layer(rope_scaling=eagle.LLAMA3 | {"low_freq_factor": 0}), WeightsCorrupt, "cannot be read"),
    (layer(rope_scaling={"rope_type": "linear", "factor": float("nan")}), WeightsCorrupt, "frequencies"),
    (config(norm_before_residual="false"), WeightsCorrupt, "norm_before_residual='false' is not true or false"),
    (config(norm_output=1), WeightsCorrupt, "norm_output=1 is not true or false"),
    (config(fc_norm=True), WeightsCorrupt, "missing"),
]

UNSUPPORTED: list[Case] = [
    (layer(hidden_act="gelu"), UnsupportedModel, "gelu"),
    (layer(model_type="gpt2"), UnsupportedModel, "gpt2"),
    (layer(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), UnsupportedModel, "dynamic"),
    (layer(quantization_config={"quant_method": "fp8"}), UnsupportedModel, "quantized"),
    (config(quantization_config={"quant_method": "compressed-tensors"}), UnsupportedModel, "quantized"),
]

OF_SPECFORGE: list[Case] = [
    (config(architectures=["DeepseekV2ForCausalLMEagle3"]), UnsupportedModel, "DeepseekV2ForCausalLMEagle3"),
    (config(eagle_config={"use_aux_hidden_state": False}), UnsupportedModel, "last hidden states only"),
    (config(eagle_config={"use_aux_hidden_state": "false"}), WeightsCorrupt, "use_aux_hidden_state='false'"),
    (config(eagle_config={"eagle_aux_hidden_state_layer_ids": ["a"]}), WeightsCorrupt, "cannot be read"),
    (config(target_hidden_size=64), WeightsCorrupt, "has the shape"),
]

OF_SPECULATORS: list[Case] = [
    (layer(num_hidden_layers=1 << 40), WeightsCorrupt, "num_hidden_layers"),
    (config(transformer_layer_config=None), WeightsCorrupt, "transformer_layer_config is no object"),
    (config(speculators_config=[1]), WeightsCorrupt, "cannot be read"),
    (config(speculators_model_type="peagle"), UnsupportedModel, "several positions at once"),
    (config(speculators_model_type="dflash"), UnsupportedModel, "dflash"),
    (
        layer(model_type="qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=0),
        UnsupportedModel,
        "sliding window",
    ),
]

OF_BOTH = [*FILES, *TENSORS, *SIZES, *LAYER_IDS, *NUMBERS, *UNSUPPORTED]
CASES = [
    *((published, *case) for published in FORMATS for case in OF_BOTH),
    *((SPECFORGE, *case) for case in OF_SPECFORGE),
    *((SPECULATORS, *case) for case in OF_SPECULATORS),
]


@pytest.mark.parametrize(("published", "fault", "error", "reason"), CASES, ids=map(str, range(len(CASES))))
def test_a_head_that_cannot_be_run_is_refused_by_name(
    published: Published, fault: Fault, error: type[McsdError], reason: str, tmp_path: Path
) -> None:
    published.write(tmp_path)
    fault(tmp_path)
    with pytest.raises(error, match=reason) as raised:
        load_draft(tmp_path, LoadedModel(eagle.target(), None))
    assert "\n" not in str(raised.value)
    assert len(raised.value.message) < 500
    assert raised.value.hint


@pytest.mark.parametrize("published", FORMATS, ids=str)
@pytest.mark.parametrize("name", COMMON)
def test_an_engine_is_not_made(name: str, published: Published, tmp_path: Path) -> None:
    fault, reason = COMMON[name]
    eagle.target_network().save_pretrained(tmp_path / "target")
    published.write(tmp_path / "head")
    fault(tmp_path / "head")
    with pytest.raises(mcsd.errors.ModelError, match=reason):
        mcsd.Engine.load(tmp_path / "target", draft=tmp_path / "head", tree="2x1")


def test_weights_in_several_files_are_read(tmp_path: Path) -> None:
    """As transformers names them; d2t may be int32."""
    SPECFORGE.write(tmp_path)
    cast("d2t", torch.int32)(tmp_path)
    parts = [(f"model-0000{part + 1}-of-00002", lambda index, part=part: index % 2 == part) for part in range(2)]
    shards(*parts)(tmp_path)
    head = load_draft(tmp_path, LoadedModel(eagle.target(), None))
    assert head.vocabulary.tolist() == eagle.KNOWN


def test_a_truncated_head_that_calls_itself_a_model(tmp_path: Path) -> None:
    """Only the tensors of EAGLE-1 and 2 tell that they are heads."""
    VARIANTS[-2].write(tmp_path)
    truncate(tmp_path)
    with pytest.raises(WeightsCorrupt, match="incomplete metadata"):
        load_draft(tmp_path, LoadedModel(eagle.target(), None))


def test_the_name_of_a_target_cannot_fill_the_screen(tmp_path: Path) -> None:
    """It is shown in the hint of an error."""
    SPECULATORS.write(tmp_path)
    layer(vocab_size=61)(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["speculators_config"]["verifier"]["name_or_path"] = "\x1b[2J\n" * 1000
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(VocabularyMismatch) as raised:
        load_draft(tmp_path, LoadedModel(eagle.target(), None))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 500
