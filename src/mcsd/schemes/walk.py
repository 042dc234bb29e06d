"""Judging node by node, from the root of a tree down."""

from collections.abc import Callable
from math import isfinite

import torch
from torch import Tensor

from mcsd.rng import Randomness
from mcsd.sampling import SparseDistributions, likeliest_tokens
from mcsd.schemes.candidates import CandidateTree, Node, Target, Verdict


def walk(target: Target, decide: Callable[[Node], tuple[Tensor, Tensor]]) -> Verdict:
    """Go down from the root, level by level; softmax only for nodes that are reached.

    Args:
        target: the candidates and the target's distributions.
        decide: as `NodeScheme.judge_node`. Nodes have as many children as the widest of their level, perhaps none.
    """
    way, candidates = _Way(target.tree), _Candidates(target.tree)
    for width in (*target.tree.shape.widths, 0):
        if not way.rows:
            break
        at = way.at()
        p, broken = target.after(at[:, 1], at[:, 2:], at[:, 0])
        if True in (lost := broken.tolist()):
            way.fail(lost)
            at, p = at[~broken], p[~broken]
        below = [way.children(row)[:width] for row in way.rows]
        picked, token = decide(candidates.node(way.rows, at, below, p))
        chosen = [nodes[place] if place >= 0 else None for nodes, place in zip(below, picked.tolist(), strict=True)]
        way.go_on(chosen, token.tolist())
    return way.verdict()


def walk_greedily(target: Target) -> Verdict:
    """`walk` where all rows are greedy: from each node to the child that is the likeliest token, if there is one."""
    tree = target.tree
    tokens, valid = tree.tokens.tolist(), tree.valid.tolist()
    way = _Way(tree)
    # Where logits do not depend on the text, those of all nodes are looked at together.
    together = not any(params.shapes_logits for params in target.settings.params)
    known = _likeliest(target.logits.flatten(0, 1)) if together else []
    columns = target.logits.shape[1]
    while way.rows:
        if together:
            here = [known[row * columns + way.column[row]] for row in way.rows]
        else:
            at = way.at()
            here = _likeliest(target.logits_after(at[:, 1], at[:, 2:], at[:, 0]))
        way.fail([not isfinite(logit) for logit, _ in here])
        likeliest = [token for logit, token in here if isfinite(logit)]
        chosen = []
        for row, token in zip(way.rows, likeliest, strict=True):
            kids = [node for node in way.children(row) if node >= 0 and valid[row][node]]
            chosen.append(next((node for node in kids if tokens[row][node] == token), None))
        way.go_on(chosen, likeliest)
    return way.verdict()


def _likeliest(logits: Tensor) -> list[tuple[float, int]]:
    """The largest of each row of ``[A, V]``, and which token it is."""
    values, tokens = likeliest_tokens(logits)
    return list(zip(values.tolist(), tokens.tolist(), strict=True))


class _Way:
    """How far each row of a batch has come on its way down a tree.

    Attributes:
        rows: those that go on.
        column: where each row is, root 0, node i 1 + i.
    """

    def __init__(self, tree: CandidateTree) -> None:
        self._device, self._depth = tree.tokens.device, tree.shape.depth
        self._children = tree.shape.children.tolist()
        self._failed: list[bool] = tree.failed.tolist()
        batch = len(self._failed)
        self._path = [[-1] * self._depth for _ in range(batch)]
        self.column, self._accepted, self._token = [0] * batch, [0] * batch, [0] * batch
        self.rows = [row for row in range(batch) if not self._failed[row]]

    def at(self) -> Tensor:
        """int64 ``[A, 2 + depth]``: the rows, the column that each has come to, and its path."""
        return torch.tensor([(row, self.column[row], *self._path[row]) for row in self.rows], device=self._device)

    def children(self, row: int) -> list[int]:
        """The nodes below a row's, padded with -1."""
        return self._children[self.column[row]]  # type: ignore[no-any-return]

    def fail(self, lost: list[bool]) -> None:
        """Rows end without a token: those of `rows` for which it is said."""
        for row, none in zip(self.rows, lost, strict=True):
            self._failed[row] = none
        self.rows = [row for row in self.rows if not self._failed[row]]

    def go_on(self, chosen: list[int | None], tokens: list[int]) -> None:
        """Each row goes on to a node, or ends with a token."""
        on = []
        for row, node, token in zip(self.rows, chosen, tokens, strict=True):
            if node is None:
                self._token[row] = token
                continue
            self._path[row][self._accepted[row]] = node
            self._accepted[row] += 1
            self.column[row] = 1 + node
            on.append(row)
        self.rows = on

    def verdict(self) -> Verdict:
        """When all have ended."""
        path = torch.tensor(self._path, dtype=torch.int64, device=self._device).view(len(self._path), self._depth)
        counts = torch.tensor([self._accepted, self._token], dtype=torch.int64, device=self._device)
        return Verdict(path, counts[0], counts[1], torch.tensor(self._failed, dtype=torch.bool, device=self._device))


class _Candidates:
    """The candidates of a tree, as numbers: gathering each node's so takes fewer operations."""

    def __init__(self, tree: CandidateTree) -> None:
        self._q = tree.q
        self._parts = tree.tokens.tolist(), tree.choice.tolist(), tree.valid.tolist()

    def node(self, rows: list[int], at: Tensor, below: list[list[int]], p: Tensor) -> Node:
        """A node of each row.

        Args:
            rows: A of the batch; at: int64 ``[A, 2 + depth]``, see `_Way.at`.
            below: the nodes below, equally many, padded with -1.
            p: ``[A, V]``.
        """
        device, width = p.device, len(below[0]) if below else 0
        parts = [
            [[part[row][node] if node >= 0 else 0 for node in nodes] for row, nodes in zip(rows, below, strict=True)]
            for part in self._parts
        ]
        tokens, choice, valid = torch.tensor(parts, dtype=torch.int64, device=device).view(3, len(rows), width)
        count = torch.tensor([sum(node >= 0 for node in nodes) for nodes in below], dtype=torch.int64, device=device)
        q = SparseDistributions(tokens[:, :0], p[:, :0])
        if self._q is not None and width:
            q = SparseDistributions(*(part[at[:, 0], at[:, 1]] for part in (self._q.support, self._q.weights)))
        return Node(p, tokens, valid.bool(), count, choice, q, at[:, 0])


def look(node: Node, token: Tensor) -> tuple[Tensor, Tensor]:
    """Accept the first child that is ``token``, int64 ``[A]``; see `NodeScheme.judge_node` for what is returned."""
    hit = (node.tokens == token[:, None]) & node.valid
    first = torch.nn.functional.pad(hit, (0, 1), value=True).to(torch.int8).argmax(-1)
    return first.masked_fill(first == hit.shape[1], -1), token


def sample_then_look(node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
    """Sample y from the target and accept y if it is a child: right for candidates however they came about."""
    return look(node, random.sample(node.p[:, None], 1, node.rows)[:, 0, 0])
