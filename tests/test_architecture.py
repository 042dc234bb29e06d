"""The order of packages and modules (ARCHITECTURE.md): what may import what, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mcsd

SOURCE = Path(mcsd.__file__).parent

_BASE = {"errors", "params", "results", "tree"}
_DRAWING = {*_BASE, "grammars", "rng", "sampling", "schemes"}
_ENGINE = {*_DRAWING, "models", "drafters", "tokenization", "request", "request_queue", "prompts", "planning", "core"}
_TOOLS = {*_ENGINE, "config", "engine", "files", "lazy", "loading", "system"}

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "lazy": set(),
    "system": set(),
    "step_lock": {"errors"},
    "tree_picture": set(),
    "notebook": {"tree_picture"},
    "step_trace": {"notebook", "tree_picture"},
    "progress": set(),
    "generation_config": {"errors"},
    "params": {"errors", "generation_config"},
    "results": {"notebook", "step_trace"},
    "defaults": {"errors", "generation_config", "params"},
    "processors": {"params"},
    "grammars": {"errors", "params"},
    "tree": {"errors"},
    "timing": set(),
    "rng": set(),
    "files": {"errors"},
    "kernels": {"errors", "files", "system"},
    "graphs": {"errors"},
    "ops": {"kernels"},
    "sampling": {"grammars", "ops", "params"},
    "schemes": {"errors", "grammars", "lazy", "ops", "rng", "sampling", "tree"},
    "config": {"errors", "schemes", "tree"},
    "models": {"errors", "kernels", "lazy", "tree"},
    "testing": {"models"},
    "cpu": {"errors", "kernels", "models"},
    "cuda": {"models"},
    "loading": {"config", "cpu", "cuda", "defaults", "errors", "files", "kernels", "models", "system"},
    "drafters": {"errors", "grammars", "graphs", "models", "rng", "sampling", "schemes", "tree"},
    "control_tokens": {"errors"},
    "tokenization": {"control_tokens", "errors", "params"},
    "inputs": {"errors", "tokenization"},
    "stop_strings": set(),
    "detokenization": {"control_tokens", "params", "stop_strings"},
    "request": {"detokenization", "errors", "grammars", "params", "results", "step_trace"},
    "prompts": {"errors", "params", "tokenization"},
    "planning": {*_BASE, "files", "graphs", "loading", "models", "schemes", "system"},
    "request_queue": {
        *(
            "defaults",
            "errors",
            "generation_config",
            "grammars",
            "models",
            "params",
            "processors",
            "request",
            "results",
        ),
        "step_lock",
        "tokenization",
    },
    "tracing": {"graphs", "sampling", "schemes", "step_trace"},
    "batch": {"drafters", "errors", "models", "params", "request", "request_queue"},
    "core": {
        *_DRAWING,
        "batch",
        "drafters",
        "graphs",
        "kernels",
        "models",
        "planning",
        "request",
        "step_trace",
        "timing",
        "tracing",
    },
    "calibration": {*_ENGINE},
    "engine": {*_ENGINE, "calibration", "config", "cpu", "defaults", "inputs", "loading", "notebook", "progress"},
    "hf": {*_ENGINE, "config", "engine"},
    "stepping_thread": {"errors", "request", "request_queue", "results"},
    "async_engine": {"engine", "errors", "request", "results", "stepping_thread", "tokenization"},
    "server": {
        "async_engine",
        "config",
        "engine",
        "errors",
        "lazy",
        *("models", "params", "planning", "request", "results", "step_trace", "stop_strings"),
    },
    "batch_files": {"async_engine", "config", "engine", "errors", "files", "lazy", "server"},
    "ray": {"async_engine", "batch_files", "config", "engine", "errors", "lazy", "params", "results", "server"},
    "tune": {*_ENGINE, "config", "files", "lazy", "loading"},
    "verify": _TOOLS,
    "distill": {*_TOOLS, "cpu"},
    "bench": {*_TOOLS, "cpu"},
    "cli": {
        *_TOOLS,
        "batch_files",
        "bench",
        "distill",
        "ray",
        "server",
        "step_trace",
        "tree_picture",
        "tune",
        "verify",
    },
}

ORDER: dict[str, tuple[str, ...]] = {
    "kernels": ("build", "library", "huge_pages", "gemm", "attention", "decoder", "distributions", "bf16_linear"),
    "models": (
        *(
            "layout",
            "protocol",
            "masks",
            "prefill",
            "prefix_cache",
            "kv_cache",
            "llama",
            "unmodified",
            "unpacked_linear",
            "fusion",
            "draft_vocabulary",
        ),
        *("transformers", "self_check", "draft_head", "bound_head", "token_texts", "vocabulary_map", "compatibility"),
    ),
    "cpu": (
        *("quantization", "packed_linear", "weight_plan", "native_linear", "gguf_linear", "onednn_linear"),
        *("packing", "fastest", "native_layers", "native_decoder", "native_draft_head", "draft_int4", "reference"),
    ),
    "cuda": ("triton_code", "triton_kernels", "layers"),
    "loading": (
        *("catalog", "disk_usage", "gguf_cache", "gguf_file", "pretrained", "gguf_network", "converted", "int8_cache"),
        *("mtp_head", "published_heads", "speculators_format", "load"),
    ),
    "schemes": (
        *("registry", "mixed_shape", "types", "residual", "device_walk", "node_level", "tree_level", "mixed", "base"),
        *("optimum", "recursive", "naive", "greedy_draft", "kseq", "spechub", "block", "traversal"),
    ),
    "hf": ("call", "speculator"),
    "server": (
        *("options", "logs", "schema", "scope", "api_errors", "metrics", "service", "page", "gateway", "parameters"),
        *("tool_calls", "answers", "traces", "streams", "chat", "completions", "responses", "app", "listen"),
    ),
    "batch_files": ("options", "lines", "output", "answers", "run"),
    "ray": ("options", "data", "routing", "router", "front_metrics", "front", "replica", "application", "local"),
    "drafters": (
        *("base", "level", "model", "translated", "head", "look_up", "corpus", "depths", "ngram", "mixed", "make"),
    ),
    "planning": ("acceptance", "costs", "plan", "look_up", "search", "profile", "stretch", "planner", "trials"),
}
"""Modules of a package, from low to high: each imports earlier ones only. The package itself may import all of them."""


def imported(path: Path) -> set[str]:
    """The modules of mcsd that a file imports anywhere, as dotted names without the leading ``mcsd``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "mcsd":
            found |= {alias.name for alias in node.names if not alias.name.startswith("_")}
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mcsd."):
            module = str(node.module).removeprefix("mcsd.")
            found.add(module)
            found |= {f"{module}.{alias.name}" for alias in node.names if is_module(f"{module}.{alias.name}")}
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("mcsd.") for alias in node.names if alias.name.startswith("mcsd.")}
    return found


def is_module(name: str) -> bool:
    path = SOURCE.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def files_of(package: str) -> list[Path]:
    single = SOURCE / f"{package}.py"
    return [single] if single.exists() else sorted((SOURCE / package).rglob("*.py"))


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_packages_import_lower_ones_only(package: str) -> None:
    assert files_of(package)
    for path in files_of(package):
        packages = {name.split(".")[0] for name in imported(path)}
        assert packages - {package} <= MAY_IMPORT[package], path.name


def test_packages_do_not_import_each_other_in_a_circle() -> None:
    placed: set[str] = set()
    while len(placed) < len(MAY_IMPORT):
        free = {package for package, below in MAY_IMPORT.items() if package not in placed and below <= placed}
        assert free, f"a circle among {sorted(set(MAY_IMPORT) - placed)}"
        placed |= free


@pytest.mark.parametrize("package", sorted(ORDER))
def test_modules_of_a_package_import_lower_ones_only(package: str) -> None:
    order = ORDER[package]
    for path in files_of(package):
        if path.stem == "__init__":
            continue
        below = {f"{package}.{name}" for name in order[: order.index(path.stem)]}
        own = {name for name in imported(path) if name.startswith(f"{package}.")}
        assert own <= below, path.name


def test_every_module_has_its_place() -> None:
    packages = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert packages - {"__init__", "__main__"} == set(MAY_IMPORT)
    for package, order in ORDER.items():
        assert {path.stem for path in files_of(package)} - {"__init__"} == set(order)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("modules", "library"),
    [
        ("mcsd mcsd.cli.app mcsd.config mcsd.errors mcsd.params mcsd.system mcsd.tree mcsd.schemes.registry", "torch"),
        ("mcsd.models mcsd.drafters mcsd.testing mcsd.schemes mcsd.sampling", "transformers"),
    ],
)
def test_modules_that_start_fast_do_not_import_large_libraries(modules: str, library: str) -> None:
    code = f"import sys, {', '.join(modules.split())}; sys.exit({library!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_file_is_longer_than_400_lines() -> None:
    files = [path for path in SOURCE.rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    assert len(files) > 100
    assert not [path.name for path in files if len(path.read_text().splitlines()) > 400]


def test_the_exported_names() -> None:
    assert sorted(mcsd.__all__) == [
        *("AsyncEngine", "Chunk", "Completion", "Engine", "SCHEMES", "SamplingParams", "Stats", "StepTrace"),
        *("TokenLogprobs", "TreeShape", "__version__", "errors"),
    ]
    assert all(hasattr(mcsd, name) for name in mcsd.__all__)
    assert sorted(mcsd.SCHEMES) == [
        *("block", "greedy-draft", "k-seq", "mcss", "mcss-wor", "naive", "spechub", "top-k", "traversal")
    ]
