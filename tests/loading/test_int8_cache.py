"""The int8 cache: the second load has exactly the weights of the first, and never those of another model."""

import shutil
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mcsd import errors
from mcsd.cpu.packed_linear import PackedLinear
from mcsd.cpu.packing import pack
from mcsd.cpu.weight_plan import Role, WeightPlan, has_int8_gemm, plan_weights
from mcsd.loading.catalog import path_of, pull
from mcsd.loading.gguf_cache import GgufCache
from mcsd.loading.int8_cache import pack_from_int8_cache
from mcsd.loading.load import load
from mcsd.models import DecoderModel, LanguageModel, TokenLayout, TransformersModel
from support.tiny import FAMILIES, tiny

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not has_int8_gemm(CPU), reason="this CPU has no fast int8 products")


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GgufCache:
    """The cached copy of a stand-in for a GGUF file."""
    monkeypatch.setenv("MCSD_HOME", str(tmp_path / "home"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    made = GgufCache(path, torch.float32)
    made.write(tiny("llama"), None)
    return made


def int8_plan(role: Role = Role.TARGET) -> WeightPlan:
    # A head has one-byte activations on every CPU, as a draft has without our kernels.
    return plan_weights(CPU, torch.float32, role, "int8")


def packed(network: Any, copy: GgufCache, role: Role = Role.TARGET) -> Any:
    pack_from_int8_cache(network, int8_plan(role), copy)
    return network


def packed_anew(network: Any, role: Role = Role.TARGET) -> Any:
    pack(network, int8_plan(role))
    return network


def logits(model: LanguageModel) -> Tensor:
    cache = model.new_cache(1, 8)
    cache.add()
    return model.forward(torch.tensor([[3, 1, 4, 1, 5]]), TokenLayout.chain(5), cache).logits


def assert_same(ours: Any, theirs: Any) -> None:
    """To the last bit."""
    found = {name: module for name, module in ours.named_modules() if isinstance(module, PackedLinear)}
    others = {name: module for name, module in theirs.named_modules() if isinstance(module, PackedLinear)}
    assert found.keys() == others.keys()
    for name, one in found.items():
        assert type(one) is type(others[name])
        for attribute in ("format", "two_bytes"):
            assert getattr(one, attribute, None) == getattr(others[name], attribute, None)
        assert torch.equal(one.dense(), others[name].dense())
    assert torch.equal(logits(TransformersModel(ours)), logits(TransformersModel(theirs)))


def assert_same_model(ours: DecoderModel, theirs: DecoderModel) -> None:
    """To the last bit."""
    pairs = zip(ours.weights.modules(), theirs.weights.modules(), strict=True)
    assert all(torch.equal(a.dense(), b.dense()) for a, b in pairs if isinstance(a, PackedLinear))
    assert torch.equal(logits(ours), logits(theirs))


def forbid_quantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unneeded(weight: Tensor) -> None:
        raise AssertionError("weights were quantized again")

    monkeypatch.setattr("mcsd.loading.int8_cache.quantize_int8", unneeded)
    monkeypatch.setattr("mcsd.cpu.onednn_linear.quantize_int8", unneeded)
    monkeypatch.setattr("mcsd.cpu.native_linear.quantize_int8", unneeded)


def stored(copy: GgufCache) -> Path:
    (file,) = copy.folder.glob("int8*")
    return file


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_the_same_from_disk(family: str, copy: GgufCache, monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny(family)
    expected = {role: packed_anew(deepcopy(network), role) for role in (Role.TARGET, Role.HEAD)}
    assert_same(packed(deepcopy(network), copy), expected[Role.TARGET])
    forbid_quantizing(monkeypatch)
    # W8A16 and W8A8 have the same weights.
    for role, network_of_role in expected.items():
        assert_same(packed(deepcopy(network), copy, role), network_of_role)


def test_a_gguf_model_is_quantized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pull("smollm2-135m")
    gguf = path_of("smollm2-135m")
    load(gguf, CPU, WeightPlan(torch.bfloat16))
    made = GgufCache(gguf, torch.bfloat16).folder
    monkeypatch.setenv("MCSD_HOME", str(tmp_path))
    folder = GgufCache(gguf, torch.bfloat16).folder
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("int8*"))

    int8 = partial(load, device=CPU, plan=plan_weights(CPU, torch.bfloat16, Role.TARGET, "int8"))
    # A folder is quantized at each load.
    expected = int8(folder).model
    assert_same_model(int8(gguf).model, expected)
    forbid_quantizing(monkeypatch)
    assert_same_model(int8(gguf).model, expected)


def test_weights_of_another_file_are_not_used(copy: GgufCache) -> None:
    """Even if there is no cached copy of the current file."""
    packed(tiny("llama"), copy)
    before = stored(copy).read_bytes()
    path = copy.folder.parents[2] / "model.gguf"
    path.write_bytes(b"GGUF, another")
    changed = GgufCache(path, torch.float32)
    assert changed.folder == copy.folder
    other = tiny("llama", seed=1)
    assert_same(packed(deepcopy(other), changed), packed_anew(deepcopy(other)))
    assert stored(copy).read_bytes() == before
    changed.write(other, None)
    assert not list(copy.folder.glob("int8*"))


def test_a_truncated_file_is_written_again(copy: GgufCache) -> None:
    network = tiny("llama")
    expected = packed(deepcopy(network), copy)
    file = stored(copy)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert_same(packed(deepcopy(network), copy), expected)
    assert file.read_bytes() == whole


def test_a_file_of_another_model_is_deleted_with_an_error(copy: GgufCache) -> None:
    packed(tiny("llama"), copy)
    file = stored(copy)
    tensors = load_file(file)
    tensors["lm_head"] = tensors["lm_head"][1:].contiguous()
    save_file(tensors, file)
    with pytest.raises(errors.WeightsCorrupt, match="lm_head"):
        packed(tiny("llama"), copy)
    assert_same(packed(tiny("llama"), copy), packed_anew(tiny("llama")))


def test_a_full_disk_is_a_warning(copy: GgufCache, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.warns(errors.McsdWarning, match="loading stays slow.*no space"):
        network = packed(tiny("llama"), copy)
    assert_same(network, packed_anew(tiny("llama")))
    assert not list(copy.folder.glob("int8*"))
    assert not list(copy.folder.glob(".part*"))
