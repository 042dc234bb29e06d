"""The cache of dequantized GGUF models: the same model, written again when the file changes; failures are warnings."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mcsd import errors
from mcsd.cpu.weight_plan import WeightPlan
from mcsd.loading.catalog import path_of, pull
from mcsd.loading.gguf_cache import GgufCache
from mcsd.loading.load import load
from support.tiny import tiny

CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for a GGUF file, and a cache folder of its own."""
    monkeypatch.setenv("MCSD_HOME", str(tmp_path / "home"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


def unneeded(*_: Any, **__: Any) -> None:
    raise AssertionError("the GGUF file was read again")


def test_a_second_load_reads_an_equal_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pull("smollm2-135m")
    gguf = path_of("smollm2-135m")
    monkeypatch.setenv("MCSD_HOME", str(tmp_path))
    first = load(gguf, CPU, WeightPlan(torch.float32))

    with monkeypatch.context() as patch:
        patch.setattr("transformers.GgufConfig", unneeded)
        second = load(gguf, CPU, WeightPlan(torch.float32))
    ours, theirs = first.model.weights.state_dict(), second.model.weights.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert first.model.eos_token_ids == second.model.eos_token_ids
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()  # type: ignore[union-attr]
    talk = [{"role": "user", "content": "Grüße, 世界!\n\tdef f(): pass  # <|im_end|>"}]
    one, other = first.tokenizer, second.tokenizer
    assert one is not None
    assert other is not None
    ids = one.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    assert ids == other.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    assert one.decode(ids) == other.decode(ids)
    assert one.all_special_ids == other.all_special_ids


@pytest.mark.slow
def test_a_truncated_copy_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pull("smollm2-135m")
    gguf = path_of("smollm2-135m")
    monkeypatch.setenv("MCSD_HOME", str(tmp_path))
    first = load(gguf, CPU, WeightPlan(torch.float32)).model.weights.state_dict()
    weights = GgufCache(gguf, torch.float32).folder / "model.safetensors"
    size, made = weights.stat().st_size, weights.stat().st_mtime_ns
    with weights.open("r+b") as part:
        part.truncate(size // 2)
    second = load(gguf, CPU, WeightPlan(torch.float32)).model.weights.state_dict()
    assert torch.equal(second["lm_head.weight"], first["lm_head.weight"])
    assert weights.stat().st_mtime_ns > made
    assert weights.stat().st_size == size > 4 * 100e6


def test_a_copy_belongs_to_one_version_of_one_file_in_one_dtype(file: Path) -> None:
    network = tiny("llama")
    copy = GgufCache(file, torch.float32)
    assert not copy.is_current()
    copy.write(network, None)
    assert copy.is_current()
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(copy.folder, dtype=torch.float32)
    assert torch.equal(again.lm_head.weight, network.lm_head.weight)
    assert not GgufCache(file, torch.bfloat16).is_current()
    other = file.parent / "other" / file.name
    other.parent.mkdir()
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    assert not GgufCache(other, torch.float32).is_current()

    file.write_bytes(b"GGUF, another")
    changed = GgufCache(file, torch.float32)
    assert not changed.is_current()
    changed.write(tiny("llama", seed=1), None)
    assert changed.is_current()
    assert len(list(changed.folder.parent.iterdir())) == 1, "the copy of the earlier file is gone"


def test_a_folder_that_is_not_writable_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("MCSD_HOME", str(tmp_path / "home"))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.warns(errors.McsdWarning, match="loading stays slow"):
        GgufCache(gguf, torch.float32).write(tiny("llama"), None)


def test_a_full_disk_is_a_warning(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = GgufCache(file, torch.float32)
    usage = type("Usage", (), {"free": 100_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.warns(errors.McsdWarning, match="no space"):
        copy.write(tiny("llama"), None)
    assert not list(copy.folder.parent.iterdir())


def test_an_interruption_leaves_nothing(file: Path) -> None:
    copy = GgufCache(file, torch.float32)

    class Interrupted:
        def save_pretrained(self, folder: Path) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy.write(tiny("llama"), Interrupted())
    assert not list(copy.folder.parent.iterdir())
    assert not copy.is_current()
