"""Loading for devices other than the CPU, without such a device: ``meta`` stands for one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mcsd import errors
from mcsd.cpu.fastest import fastest_dtype, fastest_precision
from mcsd.cpu.weight_plan import WeightPlan
from mcsd.loading.converted import read_converted
from mcsd.loading.gguf_cache import GgufCache
from mcsd.loading.load import load, read_transformers, resolve_device, resolve_dtype
from support.tiny import tiny

CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 0)
PLAIN = WeightPlan(torch.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GgufCache:
    """The converted copy of a stand-in for a GGUF file."""
    monkeypatch.setenv("MCSD_HOME", str(tmp_path / "home"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    cache = GgufCache(path, torch.float32)
    cache.write(tiny("llama"), None)
    return cache


def test_weights_go_straight_to_their_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were read to another device first")

    monkeypatch.setattr("transformers.PreTrainedModel.to", moved)
    model: Any = load(folder, META, PLAIN).model
    assert model.device == META
    assert {parameter.device for parameter in model.network.parameters()} == {META}
    assert read_transformers(folder, torch.float32, META)[0].device == META


def test_a_converted_copy_goes_straight_to_its_device(copy: GgufCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_to(path: Path, device: str) -> dict[str, torch.Tensor]:
        """safetensors itself knows no ``meta``."""
        return {name: tensor.to(device) for name, tensor in load_file(path).items()}

    monkeypatch.setattr("mcsd.loading.converted.load_file", load_to)
    read = read_converted(copy, META)
    assert read is not None
    assert {parameter.device for parameter in read[0].parameters()} == {META}


def too_large(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def test_weights_that_do_not_fit_into_memory_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", too_large)
    with pytest.raises(errors.OutOfMemory, match="memory of meta") as info:
        load(folder, META, PLAIN)
    assert info.value.hint


def test_a_converted_copy_that_does_not_fit_into_memory_is_kept(
    copy: GgufCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcsd.loading.converted.load_file", too_large)
    with pytest.raises(errors.OutOfMemory, match="memory of meta"):
        load(tmp_path / "model.gguf", META, PLAIN)
    assert copy.is_current()


def test_quantized_weights_whose_library_is_missing_are_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.MissingPackage) as info:
        load(folder, CPU, PLAIN)
    assert info.value.hint
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("native", [True, False])
def test_auto_takes_bfloat16_only_where_a_card_has_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    expected = torch.bfloat16 if native else torch.float16
    assert resolve_dtype("auto", CUDA) == expected
    assert fastest_precision(CUDA) == (expected, None)
    assert fastest_dtype(CUDA) == (torch.bfloat16 if native else torch.float32)


def test_a_device_is_resolved_with_its_index() -> None:
    assert resolve_device("auto" if not torch.cuda.is_available() else "cpu") == CPU
    assert resolve_device("meta") == META
