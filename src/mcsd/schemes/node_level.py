"""Node-level verification: one node after the other, from the root of a tree down.

On a CPU the host follows each sequence and computes only what is reached; on a GPU see `mcsd.schemes.device_walk`.
"""

from collections.abc import Callable
from math import isfinite

import torch
from torch import Tensor

from mcsd import ops
from mcsd.rng import Randomness
from mcsd.sampling import SparseDistributions
from mcsd.schemes.device_walk import verify_greedy_on_device, verify_nodes_on_device
from mcsd.schemes.mixed_shape import looked_up
from mcsd.schemes.types import CandidateTree, Node, TargetDistributions, VerificationResult


def verify_nodes(
    target: TargetDistributions, verify_node: Callable[[Node], tuple[Tensor, Tensor]]
) -> VerificationResult:
    """Descend from the root, level by level. The softmax is computed only for nodes that are reached.

    Args:
        target: the candidates and the target's distributions.
        verify_node: as `NodeScheme.verify_node`. Nodes are padded to the widest of their level; it may have none.
    """
    if target.logits.device.type != "cpu":
        return verify_nodes_on_device(target, verify_node)
    paths, candidates = _BatchPaths(target.tree), _CandidateLists(target.tree)
    for level, width in enumerate((*target.tree.shape.widths, 0)):
        if not paths.active:
            break
        current = paths.current()
        p, broken = target.after(current[:, 1], current[:, 2:], current[:, 0])
        if True in (failed := broken.tolist()):
            paths.fail(failed)
            current, p = current[~broken], p[~broken]
        children = [paths.children(sequence)[:width] for sequence in paths.active]
        picked, token = verify_node(candidates.node(paths.active, current, children, p, level))
        accepted = [nodes[i] if i >= 0 else None for nodes, i in zip(children, picked.tolist(), strict=True)]
        paths.advance(accepted, token.tolist())
    return paths.result()


def verify_greedy(target: TargetDistributions) -> VerificationResult:
    """`verify_nodes` if all sequences are greedy: descend to the child that is the target's argmax, if any."""
    if target.logits.device.type != "cpu":
        return verify_greedy_on_device(target)
    tree = target.tree
    tokens, valid = tree.tokens.tolist(), tree.valid.tolist()
    paths = _BatchPaths(tree)
    # Where logits do not depend on the tokens before (penalties), the argmax of all nodes is computed in one call.
    at_once = not target.sampling.any_penalties
    best_by_column = _argmax(target.logits.flatten(0, 1)) if at_once else []
    columns = target.logits.shape[1]
    while paths.active:
        if at_once:
            best = [best_by_column[sequence * columns + paths.column[sequence]] for sequence in paths.active]
        else:
            current = paths.current()
            best = _argmax(target.logits_after(current[:, 1], current[:, 2:], current[:, 0]))
        paths.fail([not isfinite(logit) for logit, _ in best])
        best_tokens = [token for logit, token in best if isfinite(logit)]
        accepted = []
        for sequence, token in zip(paths.active, best_tokens, strict=True):
            children = [node for node in paths.children(sequence) if node >= 0 and valid[sequence][node]]
            accepted.append(next((node for node in children if tokens[sequence][node] == token), None))
        paths.advance(accepted, best_tokens)
    return paths.result()


def _argmax(logits: Tensor) -> list[tuple[float, int]]:
    """The largest logit of each row of ``[A, V]``, and its token."""
    values, tokens = ops.argmax(logits)
    return list(zip(values.tolist(), tokens.tolist(), strict=True))


class _BatchPaths:
    """The path accepted so far in each tree of a batch.

    Attributes:
        active: the sequences whose verification goes on.
        column: the last accepted column of each sequence, root 0, node i 1 + i.
    """

    def __init__(self, tree: CandidateTree) -> None:
        self._device, self._depth = tree.tokens.device, tree.shape.depth
        self._children = tree.shape.children.tolist()
        self._failed: list[bool] = tree.failed.tolist()
        batch = len(self._failed)
        self._path = [[-1] * self._depth for _ in range(batch)]
        self.column, self._accepted, self._token = [0] * batch, [0] * batch, [0] * batch
        self.active = [sequence for sequence in range(batch) if not self._failed[sequence]]

    def current(self) -> Tensor:
        """int64 ``[A, 2 + depth]`` for each active sequence: its index, its column and its path."""
        table = [(sequence, self.column[sequence], *self._path[sequence]) for sequence in self.active]
        return torch.tensor(table, device=self._device)

    def children(self, sequence: int) -> list[int]:
        """The children of a sequence's column, padded with -1."""
        return self._children[self.column[sequence]]  # type: ignore[no-any-return]

    def fail(self, failed: list[bool]) -> None:
        """End some of the active sequences without a token."""
        for sequence, has_failed in zip(self.active, failed, strict=True):
            self._failed[sequence] = has_failed
        self.active = [sequence for sequence in self.active if not self._failed[sequence]]

    def advance(self, accepted: list[int | None], tokens: list[int]) -> None:
        """Each active sequence moves to its accepted node, or ends with its token where that is None."""
        active = []
        for sequence, node, token in zip(self.active, accepted, tokens, strict=True):
            if node is None:
                self._token[sequence] = token
                continue
            self._path[sequence][self._accepted[sequence]] = node
            self._accepted[sequence] += 1
            self.column[sequence] = 1 + node
            active.append(sequence)
        self.active = active

    def result(self) -> VerificationResult:
        """The result, once no sequence is active."""
        path = torch.tensor(self._path, dtype=torch.int64, device=self._device).view(len(self._path), self._depth)
        counts = torch.tensor([self._accepted, self._token], dtype=torch.int64, device=self._device)
        return VerificationResult(
            path, counts[0], counts[1], torch.tensor(self._failed, dtype=torch.bool, device=self._device)
        )


class _CandidateLists:
    """The candidates of a tree as Python lists: gathering a level's nodes from lists takes fewer tensor operations."""

    def __init__(self, tree: CandidateTree) -> None:
        self._q, self._mixed = tree.q, tree.mixed
        self._lists = tree.tokens.tolist(), tree.choice.tolist(), tree.valid.tolist()

    def node(self, sequences: list[int], current: Tensor, children: list[list[int]], p: Tensor, level: int) -> Node:
        """One node of each of A sequences.

        Args:
            sequences: indices in the batch; current: int64 ``[A, 2 + depth]``, see `_BatchPaths.current`.
            children: their nodes, lists of equal length, padded with -1.
            p: ``[A, V]``.
            level: depth of the nodes.
        """
        device, width = p.device, len(children[0]) if children else 0
        gathered = [
            [
                [values[sequence][node] if node >= 0 else 0 for node in nodes]
                for sequence, nodes in zip(sequences, children, strict=True)
            ]
            for values in self._lists
        ]
        tokens, choice, valid = torch.tensor(gathered, dtype=torch.int64, device=device).view(3, len(sequences), width)
        count = torch.tensor([sum(node >= 0 for node in nodes) for nodes in children], dtype=torch.int64, device=device)
        q = SparseDistributions(tokens[:, :0], p[:, :0])
        if self._q is not None and width:
            index = current[:, 0], current[:, 1]
            q = SparseDistributions(*(part[index] for part in (self._q.support, self._q.weights)))
        is_looked_up = looked_up(self._mixed, level, current[:, 1])
        return Node(p, tokens, valid.bool(), count, choice, q, current[:, 0], level, is_looked_up)


def match(node: Node, token: Tensor) -> tuple[Tensor, Tensor]:
    """Accept the first child that is ``token``, int64 ``[A]``; returns as `NodeScheme.verify_node`."""
    hit = (node.tokens == token[:, None]) & node.valid
    first = torch.nn.functional.pad(hit, (0, 1), value=True).to(torch.int8).argmax(-1)
    return first.masked_fill(first == hit.shape[1], -1), token


def sample_and_match(node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
    """Sample y from the target and accept y if it is a child: lossless for any candidates."""
    return match(node, random.sample(node.p[:, None], 1, node.sequences)[:, 0, 0])
