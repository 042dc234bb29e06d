"""Ways to run the command line, and a model that starts at once."""

import io
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mcsd.catalog import Location, locate
from mcsd.cli import main


class Result(NamedTuple):
    """What one command line came to."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in this process: quick, since nothing is imported anew."""

    def run(*words: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Result(code, *capsys.readouterr())

    return run


def start(*words: object, **streams: Any) -> subprocess.Popen[str]:
    """Start a command line in a process of its own. One thread: several that spin-wait on a busy machine crawl."""
    command = [sys.executable, "-m", "mcsd.cli", *map(str, words)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Where the tests themselves run in the background, Ctrl-C is ignored, and a child would inherit that.
    return subprocess.Popen(command, text=True, env=environment, preexec_fn=_heed_ctrl_c, **streams)


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def smollm2_location() -> Location:
    """The real model, fetched if it is missing."""
    return locate("smollm2-135m")


@pytest.fixture(scope="session")
def tiny(smollm2_location: Location, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two small random layers behind SmolLM2's tokenizer and chat template."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    source, file = smollm2_location.source, smollm2_location.file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
        config = AutoConfig.from_pretrained(source, gguf_file=file)
        # Weights large enough for some tokens to be likely.
        config.update({"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "num_attention_heads": 2})
        config.update({"num_hidden_layers": 2, "num_key_value_heads": 1, "initializer_range": 0.5, "dtype": "float32"})
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def assert_one_line_error(result: Result, code: int, *words: str) -> None:
    """Exactly one line that says what is wrong and one that says what to do, and nothing on stdout."""
    assert (result.code, result.out) == (code, ""), result
    lines = result.err.splitlines()
    assert len(lines) == 2, result.err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    assert len(lines[1]) > len("hint: ")
    for word in words:
        assert word in lines[0]
