"""What several tests need: real weights and tiny random models of every tested family."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from mcsd import kernels
from mcsd.catalog import models_folder
from mcsd.errors import McsdWarning
from mcsd.models.loading import Loaded, load

LONGEST = (
    *("distill/test_distill.py", "e2e/test_same_text_tiny.py", "e2e/test_same_text.py", "laws/test_engine_law.py"),
    *("models/test_fusion.py", "e2e/test_smollm2.py", "e2e/test_default_draft.py", "test_engine.py"),
    *("laws/test_trimmed_law.py", "cli/test_cli_generate.py", "cli/test_cli_tune.py", "cli/test_cli_verify.py"),
    *("models/test_converted.py", "cli/test_cli_bench.py", "test_engine_states.py", "models/test_cache_states.py"),
    *("e2e/test_readme.py", "verify/test_verify.py", "e2e/test_bench_smollm2.py", "distill/test_writer.py"),
)
"""Files that take longest, longest first."""

# The suite runs two files at a time, and two threads that wait for each other on a busy core crawl.
torch.set_num_threads(1)

# Where our kernels cannot be compiled a warning says so once, which would be the error of whichever test came first.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", McsdWarning)
    kernels.available()

VOCABULARY = 96

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED = _COMMON | {"intermediate_size": 64, "num_key_value_heads": 2}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=16),
    "opt": lambda: OPTConfig(**_COMMON, ffn_dim=64, word_embed_proj_dim=32),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=None
    ),
    "mistral-window": lambda: MistralConfig(**_GROUPED, head_dim=8, sliding_window=7),
    "gemma3-window": lambda: transformers.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=7),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest: a long file that is begun last leaves all workers but one idle."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


def tiny(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model, its weights large enough for clear preferences."""
    torch.manual_seed(seed)
    model: Any = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.25)
    return model.eval()


@pytest.fixture(scope="session", autouse=True)
def own_profiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Weights are shared with whoever runs the tests; what is measured meanwhile is not kept."""
    home, shared = tmp_path_factory.mktemp("home"), models_folder().parent
    for name in ("models", "converted", "compiled"):
        (shared / name).mkdir(parents=True, exist_ok=True)
        (home / name).symlink_to(shared / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCSD_HOME", str(home))
        yield


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def smollm2() -> Loaded:
    """SmolLM2-135M-Instruct in float32, fetched once."""
    return load("smollm2-135m", torch.device("cpu"), torch.float32)
