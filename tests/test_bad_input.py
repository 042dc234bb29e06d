"""Bad input gives a named error with a hint before anything runs; other requests are not affected."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mcsd
from mcsd import errors
from mcsd.cpu.weight_plan import Role, WeightPlan, plan_weights
from mcsd.loading.load import load, resolve_device, resolve_dtype
from mcsd.loading.pretrained import _QUANTIZATION_PACKAGES
from mcsd.testing import TabularModel
from support.tiny import VOCABULARY, tiny

UNIFORM = TabularModel(torch.full((4, 4), 0.25))
CPU = torch.device("cpu")


def check(info: pytest.ExceptionInfo[errors.McsdError], *words: str) -> None:
    error = info.value
    assert error.hint
    assert "\n" not in str(error)
    for word in words:
        assert word in error.message


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"scheme": "mcts"}, errors.UnknownScheme, "mcts"),
        ({"tree": "4x"}, errors.InvalidTree, "4x"),
        ({"tree": "4096x4096x4096"}, errors.InvalidTree, "1024"),
        ({"max_batch": 0}, errors.InvalidOption, "max_batch"),
        ({"max_batch": 10**9}, errors.InvalidOption, "max_batch"),
        ({"max_length": -5}, errors.InvalidOption, "max_length"),
        ({"max_length": 10**12}, errors.InvalidOption, "max_length"),
        ({"max_batch": 4096, "max_length": 1 << 20}, errors.InvalidOption, "tokens"),
        ({"draft": TabularModel(torch.full((5, 5), 0.2))}, errors.VocabularyMismatch, "5"),
        ({"draft": object()}, errors.UnsupportedModel, "object"),
    ],
)
def test_options(options: dict[str, Any], error: type[errors.McsdError], word: str) -> None:
    with pytest.raises(error) as info:
        mcsd.Engine(**{"target": UNIFORM, "draft": UNIFORM, **options})
    check(info, word)


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"target": "no-such-model"}, errors.UnknownModel, "no-such-model"),
        ({"dtype": "int3"}, errors.InvalidOption, "int3"),
        ({"device": "quantum"}, errors.InvalidOption, "quantum"),
        ({"device": "cuda:99"}, errors.InvalidOption, "cuda:99"),
        ({"quantize": "int3"}, errors.InvalidOption, "int3"),
        ({"scheme": "x"}, errors.UnknownScheme, "x"),
        ({"tree": "x"}, errors.InvalidTree, "x"),
        ({"tree": "2x1", "scheme": "block"}, errors.InvalidTree, "2x1"),
        ({"tree": "2x3", "scheme": "spechub"}, errors.InvalidTree, "2x3"),
        ({"tree": "chain:300", "scheme": "traversal"}, errors.InvalidTree, "chain:300"),
    ],
)
def test_loading_options(options: dict[str, Any], error: type[errors.McsdError], word: str) -> None:
    with pytest.raises(error) as info:
        mcsd.Engine.load(**options)
    check(info, word)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ([], errors.EmptyPrompt),
        ([1, 4], errors.TokenOutOfVocabulary),
        ([-1], errors.TokenOutOfVocabulary),
        ([1] * 16, errors.PromptTooLong),
        ("text", errors.InvalidParameter),
        (3, errors.InvalidParameter),
        (None, errors.InvalidParameter),
        ([1.5], errors.InvalidParameter),
        ([[1]], errors.InvalidParameter),
        (["a"], errors.InvalidParameter),
    ],
)
def test_prompts(prompt: Any, error: type[errors.McsdError]) -> None:
    engine = mcsd.Engine(UNIFORM, UNIFORM, tree="2x2", max_length=16)
    running = engine.stream([1], mcsd.SamplingParams(seed=1, max_new_tokens=12))
    first = next(running)
    with pytest.raises(error) as info:
        engine.generate([[1], prompt])
    check(info)
    # The running request is not affected.
    (expected,) = mcsd.Engine(UNIFORM, UNIFORM, tree="2x2", max_length=16).generate(
        [[1]], mcsd.SamplingParams(seed=1, max_new_tokens=12)
    )
    rest = [token for chunk in running for token in chunk.token_ids]
    assert (*first.token_ids, *rest) == expected.token_ids


def test_parameters_that_need_a_tokenizer() -> None:
    engine = mcsd.Engine(UNIFORM, UNIFORM)
    with pytest.raises(errors.InvalidParameter):
        engine.generate([[1]], mcsd.SamplingParams(stop="x"))
    with pytest.raises(errors.TokenOutOfVocabulary):
        engine.generate([[1]], mcsd.SamplingParams(logit_bias={4: 1.0}))
    with pytest.raises(errors.InvalidParameter):
        engine.generate([[1], [2]], [mcsd.SamplingParams()])
    with pytest.raises(errors.InvalidParameter, match="needs a tokenizer"):
        engine.chat([{"role": "user", "content": "hi"}])


def broken_after(token: int, value: float) -> TabularModel:
    model = TabularModel(torch.eye(6).roll(1, dims=1))
    model._logits = model._logits.clone()
    model._logits[token] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_target_logits_fail_their_request_alone(value: float, temperature: float) -> None:
    """The model breaks after token 4, which one of two requests reaches."""
    engine = mcsd.Engine(broken_after(4, value), TabularModel(torch.eye(6).roll(1, dims=1)), tree="2x2", max_batch=2)
    params = mcsd.SamplingParams(temperature=temperature, max_new_tokens=4)
    streams = [engine.stream([start], params) for start in (2, 5)]
    assert [token for chunk in streams[1] for token in chunk.token_ids] == [0, 1, 2, 3]
    with pytest.raises(errors.NonFiniteLogits) as info:
        list(streams[0])
    check(info, "target tabular gave no distribution")
    assert engine.generate([[5]], params)[0].token_ids == (0, 1, 2, 3)


def test_non_finite_draft_logits_fail_their_request_alone() -> None:
    engine = mcsd.Engine(TabularModel(torch.eye(6).roll(1, dims=1)), broken_after(4, float("nan")), tree="2x2")
    params = mcsd.SamplingParams(max_new_tokens=2)
    assert engine.generate([[0]], params)[0].token_ids == (1, 2)
    with pytest.raises(errors.NonFiniteLogits) as info:
        engine.generate([[0], [4]], params)
    check(info, "draft tabular gave no distribution")
    assert "draft='ngram'" in info.value.hint


def test_a_draft_with_padded_logits_is_accepted() -> None:
    class Tokenizer:
        eos_token_id = None

        def __len__(self) -> int:
            return 4

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join("abcd"[i] for i in ids)

    wide = torch.zeros(6, 6)
    wide[:, :4] = 0.25
    padded = TabularModel(wide)
    for target, draft in ((UNIFORM, padded), (padded, UNIFORM)):
        engine = mcsd.Engine(target, draft, Tokenizer(), tree="2x2")
        (done,) = engine.generate([[1]], mcsd.SamplingParams(max_new_tokens=50, seed=1))
        assert set(done.token_ids) <= set(range(4))
        assert done.stats.accepted_tokens > 0


def test_models_without_a_kv_cache_are_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(errors.UnsupportedModel):
        mcsd.Engine(MambaForCausalLM(config), "ngram")


def family(name: str) -> Any:
    from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoConfig, MptConfig

    config = {
        "bloom": lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2),
        "mpt": lambda: MptConfig(vocab_size=VOCABULARY, d_model=16, n_layers=1, n_heads=2),
        "gpt-neo": lambda: GPTNeoConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
        ),
    }[name]()
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", ["bloom", "mpt", "gpt-neo"])
def test_families_with_positions_from_cache_slots_are_refused(name: str) -> None:
    with pytest.raises(errors.UnsupportedModel) as info:
        mcsd.Engine(family(name), "ngram")
    check(info)


def test_an_attention_without_tree_masks_is_refused() -> None:
    network = tiny("llama")
    network.config._attn_implementation = "flash_attention_2"
    with pytest.raises(errors.UnsupportedModel) as info:
        mcsd.Engine(network, "ngram")
    check(info, "flash_attention_2")


def test_a_file_that_lacks_a_tensor_is_refused(folder: Path) -> None:
    """transformers would initialize it at random."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.down_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(errors.WeightsCorrupt) as info:
        load(folder, CPU, WeightPlan(torch.float32))
    check(info, "down_proj")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path)
    return tmp_path


def test_a_local_folder_loads(folder: Path) -> None:
    engine = mcsd.Engine.load(str(folder), dtype="float32")
    done = engine.generate([[1, 2, 3]], mcsd.SamplingParams(temperature=0, max_new_tokens=8))
    expected = mcsd.Engine(tiny("llama"), "ngram").generate(
        [[1, 2, 3]], mcsd.SamplingParams(temperature=0, max_new_tokens=8)
    )
    assert done[0].token_ids == expected[0].token_ids


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "config"])
def test_broken_weights(folder: Path, damage: str) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    if damage == "config":
        (folder / "config.json").write_text("{")
    else:
        weights.write_bytes({"truncated": data[: len(data) // 2], "garbage": b"\xff" * 4096, "empty": b""}[damage])
    with pytest.raises(errors.WeightsCorrupt) as info:
        load(folder, CPU, WeightPlan(torch.float32))
    check(info, str(folder))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"version": "1.0", "mod'),
        ("tokenizer.json", ""),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}'),
        ("tokenizer_config.json", "{"),
    ],
)
def test_a_broken_tokenizer(folder: Path, name: str, content: str) -> None:
    """It is no missing one: without any file of a tokenizer, requests are token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    assert load(folder, CPU, WeightPlan(torch.float32)).tokenizer is None
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))).save_pretrained(folder)
    assert load(folder, CPU, WeightPlan(torch.float32)).tokenizer is not None
    (folder / name).write_text(content)
    with pytest.raises(errors.WeightsCorrupt) as info:
        load(folder, CPU, WeightPlan(torch.float32))
    check(info, str(folder), "the tokenizer cannot be read")


def test_an_unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch", "architectures": ["Nonesuch"]}))
    with pytest.raises(errors.UnsupportedModel):
        load(folder, CPU, WeightPlan(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unknown_kind_of_attention(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny("qwen3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["layer_types"] = ["chunked_attention", "full_attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.UnsupportedModel) as info:
        load(tmp_path, CPU, plan_weights(CPU, dtype, Role.TARGET))
    check(info, "chunked_attention")


def test_pickled_weights_are_never_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(errors.ModelError):
        load(folder, CPU, WeightPlan(torch.float32))


def test_an_adapter_without_its_library_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would load the weights alone, which give another model's text."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(errors.MissingPackage) as info:
        load(folder, CPU, WeightPlan(torch.float32))
    check(info, "adapter", "peft")


def test_an_adapter_without_its_model_is_a_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(errors.MissingPackage) as info:
        load(tmp_path, CPU, WeightPlan(torch.float32))
    check(info, "adapter", "peft")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(errors.WeightsCorrupt) as corrupt:
        load(tmp_path, CPU, WeightPlan(torch.float32))
    check(corrupt, "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(errors.WeightsCorrupt) as corrupt:
        load(tmp_path, CPU, WeightPlan(torch.float32))
    check(corrupt, "names no model")


def quantized(folder: Path, method: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))


@pytest.mark.parametrize("method", ["awq", "compressed-tensors", "hqq", "torchao", "aqlm"])
def test_quantized_weights_name_the_package_that_they_need(folder: Path, method: str) -> None:
    package = _QUANTIZATION_PACKAGES[method].partition("[")[0]
    if importlib.util.find_spec(package.replace("-", "_")) is not None:
        pytest.skip(f"{package} is installed")
    quantized(folder, method)
    with pytest.raises(errors.MissingPackage) as info:
        load(folder, CPU, WeightPlan(torch.float32))
    check(info, f"is quantized ({method})")
    assert info.value.hint.startswith(f"pip install {package}")


def test_an_unknown_method_of_quantization_is_refused(folder: Path) -> None:
    """transformers would read the weights as if they were not quantized."""
    quantized(folder, "fancy")
    with pytest.raises(errors.UnsupportedModel) as info:
        load(folder, CPU, WeightPlan(torch.float32))
    check(info, "'fancy'")


def test_auto_selects_a_supported_device_and_dtype() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_dtype("auto", CPU) in (torch.bfloat16, torch.float32)
    assert resolve_dtype("float16", CPU) == torch.float16
