"""The tree and the batch of its paths are the same forward: every node has the same logits in both."""

import pytest
import torch

from mcsd.bench.attention import AttentionBenchmark, has_paths_to_compare, leaf_paths
from mcsd.models import TransformersModel
from mcsd.tree import TreeShape
from support.tiny import tiny


@pytest.mark.parametrize("tree", ["2", "2x2x1", "3x1", "parents:-1,-1,0,2"])
def test_both_forwards_agree(tree: str) -> None:
    shape = TreeShape.parse(tree)
    target = TransformersModel(tiny("llama"))
    subject = AttentionBenchmark(target, [5, 9, 2, 40, 77, 13], shape)
    as_tree, as_batch = subject.as_tree(), subject.as_batch()
    paths = leaf_paths(shape)
    assert as_batch.shape[:2] == paths.shape == (int((shape.children[:, 0] < 0).sum()), 1 + shape.depth)
    for sequence, path in enumerate(paths.tolist()):
        for column, node in enumerate(path):
            if column == 0 or node != path[column - 1]:
                torch.testing.assert_close(as_batch[sequence, column], as_tree[0, node], rtol=1e-4, atol=1e-4)
    # Nothing was committed: the result is the same again.
    torch.testing.assert_close(subject.as_batch(), as_batch, rtol=0, atol=0)


def test_paths_that_end_early_repeat_their_last_node() -> None:
    assert leaf_paths(TreeShape.parse("parents:-1,-1,0,2")).tolist() == [[0, 2, 2, 2], [0, 1, 3, 4]]


def test_which_trees_have_paths_to_compare() -> None:
    shapes = map(TreeShape.parse, ("none", "chain:3", "2", "1x2", "64", "65", "8x9"))
    assert [has_paths_to_compare(shape) for shape in shapes] == [False, False, True, True, True, False, False]


def test_a_measurement() -> None:
    found = AttentionBenchmark(TransformersModel(tiny("llama")), [5, 9], TreeShape.parse("2x1")).measure("mine", 3)
    assert (found.tree, found.nodes, found.paths, found.depth, found.repeat) == ("mine", 4, 2, 2, 3)
    assert found.tree_seconds > 0
    assert found.batch_seconds > 0
