"""The order of the rooms (ARCHITECTURE.md): what may import what, read from the source."""

import ast
from pathlib import Path

import pytest

import mcsd

SOURCE = Path(mcsd.__file__).parent

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "params": {"errors"},
    "tree": {"errors"},
    "rng": set(),
    "machine": set(),
    "kernels": {"catalog", "errors", "files"},
    "sampling": {"kernels", "params"},
    "schemes": {"errors", "rng", "sampling", "tree"},
    "catalog": {"errors"},
    "files": {"errors"},
    "models": {"errors", "tree", "catalog", "kernels"},
    "drafters": {"models", "schemes", "rng", "sampling", "tree"},
    "text": set(),
    "request": {"errors", "params", "text"},
    "testing": {"models"},
    "options": {"errors", "schemes", "tree"},
    "encoding": {"errors", "params"},
    "prompts": {"encoding", "params"},
    "planning": {"errors", "files", "machine", "params", "tree", "schemes", "models", "catalog"},
    "engine": {
        *("options", "encoding", "errors", "params", "tree", "rng", "sampling", "schemes", "models", "drafters"),
        *("request", "catalog", "planning", "prompts", "kernels"),
    },
    "distill": {
        *("engine", "errors", "params", "rng", "sampling", "schemes", "tree", "models", "drafters", "request"),
        *("catalog", "files"),
    },
    "bench": {
        *(
            "engine",
            "errors",
            "params",
            "rng",
            "sampling",
            "schemes",
            "tree",
            "models",
            "drafters",
            "encoding",
            "options",
        ),
        *("catalog", "files", "machine", "prompts"),
    },
    "verify": {"engine", "encoding", "errors", "params", "prompts", "sampling", "schemes", "models"},
    "tune": {
        *("engine", "errors", "files", "params", "planning", "prompts", "schemes", "tree", "models", "options"),
        "catalog",
    },
    "cli": {"bench", "tune", "distill", "verify", "engine", "errors", "params", "catalog", "options"},
}


def rooms_imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "mcsd":
            found |= {alias.name for alias in node.names if not alias.name.startswith("_")}
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mcsd."):
            found.add(str(node.module).split(".")[1])
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mcsd.")}
    return found


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_imports_point_one_way(room: str) -> None:
    files = [SOURCE / f"{room}.py"] if (SOURCE / f"{room}.py").exists() else sorted((SOURCE / room).glob("*.py"))
    assert files
    for path in files:
        assert rooms_imported(path) - {room} <= MAY_IMPORT[room], path.name


def test_every_room_has_its_place() -> None:
    rooms = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(MAY_IMPORT)


def test_the_exported_names() -> None:
    assert sorted(mcsd.__all__) == [
        *("Chunk", "Completion", "Engine", "SCHEMES", "SamplingParams", "Stats", "TokenLogprobs", "TreeShape"),
        *("__version__", "errors"),
    ]
    assert all(hasattr(mcsd, name) for name in mcsd.__all__)
    assert sorted(mcsd.SCHEMES) == [
        *("block", "greedy-draft", "k-seq", "mcss", "mcss-wor", "naive", "spechub", "top-k", "traversal")
    ]
