"""A tiny model, and a command line in this process."""

import io
import sys
import warnings
from pathlib import Path

import pytest

from mcsd.cli import main
from mcsd.loading.catalog import Location, locate
from support.cli import Result, Run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in this process, which saves the imports."""

    def run(*words: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def smollm2_location() -> Location:
    """The real model, downloaded if it is missing."""
    return locate("smollm2-135m")


@pytest.fixture(scope="session")
def tiny(smollm2_location: Location, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of two small random layers and SmolLM2's tokenizer and chat template."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    source, file = smollm2_location.source, smollm2_location.file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
        config = AutoConfig.from_pretrained(source, gguf_file=file)
        # Weights large enough for some tokens to be probable.
        config.update({"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "num_attention_heads": 2})
        config.update({"num_hidden_layers": 2, "num_key_value_heads": 1, "initializer_range": 0.5, "dtype": "float32"})
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
