"""Tree shapes: parsing, invalid trees, and parents, depths, mask, children and levels that describe the same tree."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcsd.errors import InvalidTree
from mcsd.tree import MAX_NODES, TreeShape


def assert_one_line_with_hint(error: pytest.ExceptionInfo[InvalidTree]) -> None:
    assert error.value.hint
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@st.composite
def parent_lists(draw: st.DrawFn) -> list[int]:
    size = draw(st.integers(0, 24))
    return [draw(st.integers(-1, node - 1)) for node in range(size)]


def ancestors(parents: list[int] | tuple[int, ...], node: int) -> list[int]:
    """The nodes from the root's child down to the node itself."""
    return [] if node < 0 else [*ancestors(parents, parents[node]), node]


@pytest.mark.parametrize(
    ("text", "parents", "depths"),
    [
        ("none", (), ()),
        ("1", (-1,), (1,)),
        ("3", (-1, -1, -1), (1, 1, 1)),
        ("2x2", (-1, -1, 0, 0, 1, 1), (1, 1, 2, 2, 2, 2)),
        ("2x1x2", (-1, -1, 0, 1, 2, 2, 3, 3), (1, 1, 2, 2, 3, 3, 3, 3)),
        ("02x01", (-1, -1, 0, 1), (1, 1, 2, 2)),
        ("chain:1", (-1,), (1,)),
        ("chain:4", (-1, 0, 1, 2), (1, 2, 3, 4)),
        ([], (), ()),
        ([-1, 0, -1, 2], (-1, -1, 0, 1), (1, 1, 2, 2)),
        ((-1, 0, 1, -1, 0), (-1, -1, 0, 0, 2), (1, 1, 2, 2, 3)),
    ],
)
def test_parse(text: Any, parents: tuple[int, ...], depths: tuple[int, ...]) -> None:
    shape = TreeShape.parse(text)
    assert (shape.parents, shape.depths) == (parents, depths)
    assert (len(shape), shape.depth) == (len(parents), max(depths, default=0))
    assert TreeShape.parse(shape) is shape
    if isinstance(text, str):
        assert str(shape) == text


@pytest.mark.parametrize("text", ["1024", "chain:1024", "2x" * 8 + "2", "31x32"])
def test_the_largest_trees_are_parsed(text: str) -> None:
    assert 1000 < len(TreeShape.parse(text)) <= MAX_NODES


@pytest.mark.parametrize("content", ["[-1, 0, -1, 2]", '{"parents": [-1, 0, -1, 2], "note": "x"}'])
@pytest.mark.parametrize("kind", [str, Path])
def test_parse_a_file(tmp_path: Path, content: str, kind: type) -> None:
    file = tmp_path / "shape.json"
    file.write_text(content)
    assert TreeShape.parse(kind(file)) == TreeShape([-1, -1, 0, 1])


@pytest.mark.parametrize(
    "text",
    [
        *["", " ", "x", "4x", "x4", "4xx2", "0", "4x0", "0x4", "-1", "4x-2", "+4"],
        *["4 x 2", "4x2 ", "4x2\n", "4X2", "4×2"],
        *["4.0", "1e2", "1_0", "0x10x", "auto!", "None", "²", "٤x٢", "4x٢", "chain:²", "chain:٤"],
        *["chain", "chain:", "chain:0", "chain:-1", "chain:+1", "chain: 4", "chain:4x2", "chain:99999999999"],
        *["2x" * 50, "2x" * 50 + "2", "1x" * MAX_NODES + "1", "1025", "chain:1025", "32x32", "chain:999999999"],
        *["999999999x999999999", "x".join(["999999999"] * 10_000), "9" * 1_000_000, "line\nbreak", "no\nsuch.json"],
        *[None, 4, 4.0, b"4x2", {"parents": [-1]}],
        *[[0], [1, -1], [-1, 1], [-1, 2, 0], [-2], [-1, -5], [-1] * 1025],
        *[[True], [-1, False], [-1, 0.0], [-1.0], ["-1"], [None], [[-1]], [float("nan")], [["x" * 5000]]],
    ],
    ids=lambda text: f"{text!r:.24}",
)
def test_invalid_trees_are_refused(text: Any) -> None:
    with pytest.raises(InvalidTree) as error:
        TreeShape.parse(text)
    assert_one_line_with_hint(error)


@pytest.mark.parametrize(
    "content",
    [
        *[b"", b"[-1, 0", b"{", b"\xff\xfe[", b"4x2", b"[-1] [0]", b"[" * 100_000],
        *[b"null", b"5", b"true", b'"4x2"', b"{}", b'{"parents": 5}', b'{"parents": null}', b'{"parents": {"0": -1}}'],
        *[b"[0]", b"[-1, 1]", b"[-2]", b"[-1.0]", b"[true]", b'["-1"]', b"[[-1]]", b"[null]", b"[NaN]"],
        json.dumps([-1] * 1025).encode(),
    ],
    ids=lambda content: f"{content!r:.24}",
)
def test_invalid_tree_files_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "shape.json"
    file.write_bytes(content)
    with pytest.raises(InvalidTree) as error:
        TreeShape.parse(str(file))
    assert "\n" not in str(error.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder.json"
    folder.mkdir()
    for path in (tmp_path / "missing.json", folder, Path("a\0b.json")):
        with pytest.raises(InvalidTree, match=r"\.json'? cannot be read"):
            TreeShape.parse(path)


@given(parent_lists())
@settings(deadline=None)
def test_renumbering_keeps_the_tree(listed: list[int]) -> None:
    """By depth and parent: equal trees have one list. The tree and the order of siblings are kept."""
    shape = TreeShape(listed)
    assert list(shape.depths) == sorted(len(ancestors(listed, node)) for node in range(len(listed)))
    assert list(shape.parents) == sorted(shape.parents)

    def nested(parents: list[int] | tuple[int, ...], root: int = -1) -> list[Any]:
        return [nested(parents, node) for node, parent in enumerate(parents) if parent == root]

    assert nested(shape.parents) == nested(listed)
    again = TreeShape(shape.parents)
    assert again == shape
    assert hash(again) == hash(shape)
    assert (shape == TreeShape([*shape.parents, -1])) is False


@pytest.mark.parametrize("name", ["none", "1", "3", "chain:2", "2x1", "2x2x1", "4x2x2x1", "3x1x2"])
def test_product_trees_are_named_by_their_counts(name: str) -> None:
    shape = TreeShape.parse(name)
    assert str(TreeShape(shape.parents)) == name
    assert TreeShape.parse(str(TreeShape(shape.parents))) == shape


def test_other_trees_are_named_by_their_parents() -> None:
    assert str(TreeShape([-1, -1, 0])) == "parents:-1,-1,0"
    # The same tree in another order.
    assert TreeShape([-1, -1, 0, 1, 0, 1]) == TreeShape.parse("2x2")
    assert str(TreeShape([-1, -1, 0, 1, 0, 1])) == "2x2"


@given(parent_lists())
@settings(deadline=None)
def test_tensors_describe_the_same_tree(listed: list[int]) -> None:
    shape = TreeShape(listed)
    n = len(shape)
    closure = torch.zeros(1 + n, 1 + n, dtype=torch.bool)
    for node in range(-1, n):
        closure[1 + node, [0, *(1 + ancestor for ancestor in ancestors(shape.parents, node))]] = True
    assert torch.equal(shape.mask, closure)
    assert torch.equal(shape.offsets, closure.sum(1) - 1)
    assert shape.offsets.tolist() == [0, *shape.depths]

    children = [[node for node in range(n) if shape.parents[node] == column - 1] for column in range(1 + n)]
    assert shape.children.dtype == torch.int64
    assert shape.children.shape == (1 + n, max(map(len, children)))
    assert shape.width == shape.children.shape[1]
    assert shape.widths == tuple(max(len(children[1 + node]) for node in level) for level in shape.levels)
    assert shape.paths.shape == (1 + n, shape.depth)
    for node, path in enumerate(shape.paths.tolist(), start=-1):
        nodes = [] if node < 0 else [node]
        while nodes and shape.parents[nodes[0]] >= 0:
            nodes.insert(0, shape.parents[nodes[0]])
        assert path == nodes + [-1] * (shape.depth - len(nodes))
    for row, nodes in zip(shape.children.tolist(), children, strict=True):
        assert row == nodes + [-1] * (len(row) - len(nodes))

    inner = [node for node in range(-1, n) if children[1 + node]]
    assert [node for level in shape.levels for node in level] == inner
    assert len(shape.levels) == shape.depth
    assert all(shape.offsets[1 + node] == depth for depth, level in enumerate(shape.levels) for node in level)


def test_the_name_of_a_shape_can_be_parsed() -> None:
    for text in ("4x2x1", "chain:3", "none", "parents:-1,-1,0,0,3"):
        assert str(TreeShape.parse(text)) == text
        assert TreeShape.parse(str(TreeShape(TreeShape.parse(text).parents))) == TreeShape.parse(text)


def test_the_first_levels_of_a_tree() -> None:
    tree = TreeShape.parse("3x2x1")
    assert tree.to_depth(2) == TreeShape.parse("3x2")
    assert tree.to_depth(1) == TreeShape.parse("3")
    assert tree.to_depth(3) is tree
    assert not len(tree.to_depth(0))
