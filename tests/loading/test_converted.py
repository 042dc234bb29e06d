"""Converted copies are read without the modelling code of transformers, and give the same model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mcsd import errors
from mcsd.cpu.weight_plan import Role, plan_weights
from mcsd.loading.catalog import path_of, pull
from mcsd.loading.converted import read_converted
from mcsd.loading.gguf_cache import GgufCache
from mcsd.loading.load import load
from support.tiny import tiny

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GgufCache:
    """A cache of a stand-in for a GGUF file, in a cache folder of its own."""
    monkeypatch.setenv("MCSD_HOME", str(tmp_path / "home"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return GgufCache(path, torch.float32)


def test_the_weights_and_end_tokens_of_the_copy(cache: GgufCache) -> None:
    network = tiny("llama")
    network.generation_config.eos_token_id = [3, 4]  # type: ignore[union-attr]
    cache.write(network, None)
    read = read_converted(cache, CPU)
    assert read is not None
    copy, tokenizer = read
    assert tokenizer is None
    assert copy.generation_config.eos_token_id == [3, 4]
    ours, theirs = copy.state_dict(), network.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verification_compares_with_transformers_own_network(dtype: torch.dtype) -> None:
    pull("smollm2-135m")
    plan = plan_weights(torch.device("cpu"), dtype, Role.TARGET)
    load(path_of("smollm2-135m"), torch.device("cpu"), plan)  # Writes the copy, if there is none yet.
    model = load(path_of("smollm2-135m"), torch.device("cpu"), plan).model
    assert isinstance(model.reference(), transformers.PreTrainedModel)


def test_networks_of_another_kind_are_left_to_transformers(cache: GgufCache) -> None:
    cache.write(tiny("gpt2"), None)
    assert read_converted(cache, CPU) is None


@pytest.mark.parametrize("broken", ["missing", "misshapen", "configuration", "truncated"])
def test_a_broken_copy_is_refused(cache: GgufCache, broken: str) -> None:
    cache.write(tiny("llama"), None)
    weights = cache.folder / "model.safetensors"
    tensors = load_file(weights)
    if broken == "missing":
        del tensors["model.norm.weight"]
        save_file(tensors, weights)
    elif broken == "misshapen":
        tensors["model.norm.weight"] = torch.ones(31)
        save_file(tensors, weights)
    elif broken == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        (cache.folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(errors.WeightsCorrupt, match="cannot be read"):
        read_converted(cache, CPU)


def test_loading_a_copy_imports_no_modelling_code() -> None:
    pull("smollm2-135m")
    script = """
import sys
from mcsd import Engine
engine = Engine.load("smollm2-135m", dtype="float32")
assert len(engine.generate("Hello", max_new_tokens=2).token_ids) == 2
print(*sorted({"transformers.modeling_utils", "torch._dynamo"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", script]
    subprocess.run(command, check=True, capture_output=True)  # Writes the copy, if there is none yet.
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == ""
