"""What several tests need: real weights and tiny random models of every tested family."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mcsd import kernels
from mcsd.cpu.weight_plan import WeightPlan
from mcsd.errors import McsdWarning
from mcsd.loading.load import LoadedModel, load
from mcsd.system import cache_folder
from support.tiny import FAMILIES

LONGEST = (
    "distill/test_distill.py",
    "e2e/test_same_text_tiny.py",
    "e2e/test_same_text.py",
    "laws/test_engine_law.py",
    "laws/test_mixed_law.py",
    "test_graphs.py",
    "test_gpu_waits.py",
    "e2e/test_smollm2.py",
    "e2e/test_default_draft.py",
    "test_engine.py",
    "laws/test_draft_vocabulary_law.py",
    "cli/test_cli_generate.py",
    "cli/test_cli_tune.py",
    "cli/test_cli_verify.py",
    "loading/test_gguf_cache.py",
    "cli/test_cli_bench.py",
    "test_engine_states.py",
    "models/test_kv_cache_states.py",
    "e2e/test_documentation.py",
    "verify/test_verify.py",
    "e2e/test_bench_smollm2.py",
    "distill/test_writer.py",
)
"""Files that take longest, longest first."""

# The suite runs two files at a time, and two threads that wait for each other on a busy core crawl.
torch.set_num_threads(1)

# Where our kernels cannot be compiled a warning says so once, which would be the error of whichever test came first.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", McsdWarning)
    kernels.has_kernels()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of several workers, begin with what takes longest: a long file that is begun last leaves all but one idle."""
    if not hasattr(config, "workerinput"):
        return
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def own_profiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Weights are shared with whoever runs the tests; what is measured meanwhile is not kept."""
    home, shared = tmp_path_factory.mktemp("home"), cache_folder("models").parent
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
def smollm2() -> LoadedModel:
    """SmolLM2-135M-Instruct in float32, fetched once."""
    return load("smollm2-135m", torch.device("cpu"), WeightPlan(torch.float32))


@pytest.fixture(scope="session")
def smollm2_network(smollm2: LoadedModel) -> Any:
    """The same weights as transformers runs them."""
    return smollm2.model.reference()  # type: ignore[attr-defined]
