"""The registry: its names are those of the classes, its limits are enforced, and importing it imports no torch."""

import subprocess
import sys

import pytest

import mcsd
from mcsd.errors import InvalidTree
from mcsd.schemes import SCHEMES
from mcsd.schemes.registry import REGISTRY, check_tree, supports
from mcsd.tree import TreeShape


@pytest.mark.parametrize("name", REGISTRY)
def test_the_class_has_the_registered_name(name: str) -> None:
    assert SCHEMES[name].name == name


def test_all_schemes_are_registered_and_read_only() -> None:
    assert list(SCHEMES) == list(REGISTRY)
    assert mcsd.SCHEMES is SCHEMES
    with pytest.raises(TypeError):
        SCHEMES["mcss"] = SCHEMES["naive"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "tree", "message"),
    [
        ("block", "2x1", "scheme block supports chains, and tree 2x1 has up to 2"),
        ("spechub", "2x3x1", "scheme spechub supports up to 2 candidates for a position, and tree 2x3x1 has up to 3"),
        ("traversal", "chain:257", "scheme traversal supports trees of depth 256, and tree chain:257 has depth 257"),
    ],
)
def test_trees_beyond_the_limits_are_refused(name: str, tree: str, message: str) -> None:
    shape = TreeShape.parse(tree)
    assert not supports(name, shape)
    with pytest.raises(InvalidTree, match=message) as error:
        check_tree(name, shape)
    assert error.value.hint


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("tree", ["none", "chain:256"])
def test_plain_decoding_and_chains_are_supported(name: str, tree: str) -> None:
    check_tree(name, TreeShape.parse(tree))
    assert supports(name, TreeShape.parse(tree))


@pytest.mark.thorough
def test_registry_and_tree_need_no_torch() -> None:
    code = """
import sys
from mcsd.schemes.registry import check_tree
from mcsd.tree import TreeShape
shape = TreeShape.parse("parents:-1,-1,0")
check_tree("mcss", shape)
assert (len(shape), str(shape), shape.depths, shape.width) == (3, "parents:-1,-1,0", (1, 1, 2), 2)
assert shape == TreeShape([-1, -1, 0]) and hash(shape)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
