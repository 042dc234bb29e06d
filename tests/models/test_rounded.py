"""Rounded weights on disk: the second load has the very weights of the first, and never those of another model."""

import shutil
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import FAMILIES, tiny
from mcsd import errors
from mcsd.catalog import path_of, pull
from mcsd.models import Block, TransformersModel
from mcsd.models.converted import Conversion
from mcsd.models.loading import load
from mcsd.models.packing import int8_layer, pack
from mcsd.models.product import Product
from mcsd.models.quantization import quantizable
from mcsd.models.rounded import pack_rounded

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not quantizable(CPU), reason="this CPU does not multiply bytes")


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Conversion:
    """The copy of something that stands for a GGUF file."""
    monkeypatch.setenv("MCSD_HOME", str(tmp_path / "home"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    made = Conversion(path, torch.float32)
    made.keep(tiny("llama"), None)
    return made


def packed(network: Any, copy: Conversion, fine: bool = True) -> Any:
    pack_rounded(network, fine, copy)
    return network


def unstored(network: Any, fine: bool = True) -> Any:
    pack(network, int8_layer(fine))
    return network


def logits(network: Any) -> Tensor:
    model = TransformersModel(network)
    cache = model.new_cache(1, 8)
    cache.add()
    return model.forward(torch.tensor([[3, 1, 4, 1, 5]]), Block.chain(5), cache).logits


def assert_same(ours: Any, theirs: Any) -> None:
    """To the last bit."""
    found = {name: module for name, module in ours.named_modules() if isinstance(module, Product)}
    others = {name: module for name, module in theirs.named_modules() if isinstance(module, Product)}
    assert found.keys() == others.keys()
    for name, one in found.items():
        assert type(one) is type(others[name])
        # How fine states are: ours have a kind, the library's layers say it.
        assert getattr(one, "kind", None) == getattr(others[name], "kind", None)
        assert getattr(one, "fine", None) == getattr(others[name], "fine", None)
        assert torch.equal(one.dense(), others[name].dense())
    assert torch.equal(logits(ours), logits(theirs))


def rounds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unneeded(weight: Tensor) -> None:
        raise AssertionError("weights were rounded again")

    monkeypatch.setattr("mcsd.models.rounded.round_weight", unneeded)
    monkeypatch.setattr("mcsd.models.quantization.round_weight", unneeded)
    monkeypatch.setattr("mcsd.models.native.linear.round_weight", unneeded)


def stored(copy: Conversion) -> Path:
    (file,) = copy.folder.glob("int8*")
    return file


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_the_same_from_disk(family: str, copy: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny(family)
    expected = {fine: unstored(deepcopy(network), fine) for fine in (True, False)}
    assert_same(packed(deepcopy(network), copy), expected[True])
    rounds_nothing(monkeypatch)
    # A target's weights are a draft's.
    for fine in (True, False):
        assert_same(packed(deepcopy(network), copy, fine), expected[fine])


def test_a_gguf_model_is_rounded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pull("smollm2-135m")
    gguf = path_of("smollm2-135m")
    load(gguf, CPU, torch.bfloat16)
    made = Conversion(gguf, torch.bfloat16).folder
    monkeypatch.setenv("MCSD_HOME", str(tmp_path))
    folder = Conversion(gguf, torch.bfloat16).folder
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("int8*"))

    int8 = partial(load, device=CPU, dtype=torch.bfloat16, quantize="int8")
    # A folder is rounded each time.
    expected = int8(folder).model.network
    assert_same(int8(gguf).model.network, expected)
    rounds_nothing(monkeypatch)
    assert_same(int8(gguf).model.network, expected)


def test_what_was_kept_of_another_file_is_not_used(copy: Conversion) -> None:
    """Not even where there is no room for a copy of the file as it is now."""
    packed(tiny("llama"), copy)
    before = stored(copy).read_bytes()
    path = copy.folder.parents[2] / "model.gguf"
    path.write_bytes(b"GGUF, another")
    changed = Conversion(path, torch.float32)
    assert changed.folder == copy.folder
    other = tiny("llama", seed=1)
    assert_same(packed(deepcopy(other), changed), unstored(deepcopy(other)))
    assert stored(copy).read_bytes() == before
    changed.keep(other, None)
    assert not list(copy.folder.glob("int8*"))


def test_a_file_that_was_cut_off_is_made_again(copy: Conversion) -> None:
    network = tiny("llama")
    expected = packed(deepcopy(network), copy)
    file = stored(copy)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert_same(packed(deepcopy(network), copy), expected)
    assert file.read_bytes() == whole


def test_a_file_that_does_not_fit_is_deleted_and_said(copy: Conversion) -> None:
    packed(tiny("llama"), copy)
    file = stored(copy)
    tensors = load_file(file)
    tensors["lm_head"] = tensors["lm_head"][1:].contiguous()
    save_file(tensors, file)
    with pytest.raises(errors.WeightsCorrupt, match="lm_head"):
        packed(tiny("llama"), copy)
    assert_same(packed(tiny("llama"), copy), unstored(tiny("llama")))


def test_a_full_disk_is_a_warning(copy: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.warns(errors.McsdWarning, match="loading stays slow.*no room"):
        network = packed(tiny("llama"), copy)
    assert_same(network, unstored(tiny("llama")))
    assert not list(copy.folder.glob("int8*"))
    assert not list(copy.folder.glob(".part*"))
