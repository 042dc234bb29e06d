"""Copies of GGUF models: the same model, made anew when the file is another, never in the way."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conftest import tiny
from mcsd import errors
from mcsd.catalog import path_of, pull
from mcsd.models.converted import Conversion
from mcsd.models.loading import load

CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Something that stands for a GGUF file, and a home of its own for copies."""
    monkeypatch.setenv("MCSD_HOME", str(tmp_path / "home"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


def unneeded(*_: Any, **__: Any) -> None:
    raise AssertionError("the GGUF file was read again")


def test_a_second_load_reads_a_copy_that_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pull("smollm2-135m")
    gguf = path_of("smollm2-135m")
    monkeypatch.setenv("MCSD_HOME", str(tmp_path))
    first = load(gguf, CPU, torch.float32)
    weights = Conversion(gguf, torch.float32).folder / "model.safetensors"
    made = weights.stat().st_mtime_ns

    with monkeypatch.context() as patch:
        patch.setattr("transformers.GgufConfig", unneeded)
        second = load(gguf, CPU, torch.float32)
    ours, theirs = first.model.network.state_dict(), second.model.network.state_dict()
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

    # A copy that was cut off on its way is made again.
    with weights.open("r+b") as part:
        part.truncate(weights.stat().st_size // 2)
    third = load(gguf, CPU, torch.float32)
    assert torch.equal(third.model.network.state_dict()["lm_head.weight"], ours["lm_head.weight"])
    assert weights.stat().st_mtime_ns > made
    assert weights.stat().st_size > 4 * 100e6


def test_a_copy_belongs_to_one_file_as_it_is_and_one_dtype(file: Path) -> None:
    network = tiny("llama")
    copy = Conversion(file, torch.float32)
    assert not copy.there()
    copy.keep(network, None)
    assert copy.there()
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(copy.folder, dtype=torch.float32)
    assert torch.equal(again.lm_head.weight, network.lm_head.weight)
    assert not Conversion(file, torch.bfloat16).there()
    other = file.parent / "other" / file.name
    other.parent.mkdir()
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    assert not Conversion(other, torch.float32).there()

    file.write_bytes(b"GGUF, another")
    changed = Conversion(file, torch.float32)
    assert not changed.there()
    changed.keep(tiny("llama", seed=1), None)
    assert changed.there()
    assert len(list(changed.folder.parent.iterdir())) == 1, "the copy of the earlier file is gone"


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("MCSD_HOME", str(tmp_path / "home"))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.warns(errors.McsdWarning, match="loading stays slow"):
        Conversion(gguf, torch.float32).keep(tiny("llama"), None)


def test_a_full_disk_is_a_warning(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Conversion(file, torch.float32)
    usage = type("Usage", (), {"free": 100_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.warns(errors.McsdWarning, match="no room"):
        copy.keep(tiny("llama"), None)
    assert not list(copy.folder.parent.iterdir())


def test_an_interruption_leaves_nothing(file: Path) -> None:
    copy = Conversion(file, torch.float32)

    class Interrupted:
        def save_pretrained(self, folder: Path) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy.keep(tiny("llama"), Interrupted())
    assert not list(copy.folder.parent.iterdir())
    assert not copy.there()
