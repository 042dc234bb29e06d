"""What a scheme is: a way to draw candidates and the judgement that belongs to it. Knows no model and no text.

Most published bugs pair the draw of one law with the judgement of another, so a scheme owns both halves. All
randomness goes through `mcsd.rng.Randomness`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from mcsd.errors import InvalidTree
from mcsd.rng import Randomness
from mcsd.sampling import Settings, SparseDistributions, likeliest_tokens, probabilities, shape_logits
from mcsd.tree import TreeShape


@dataclass(frozen=True)
class CandidateTree:
    """What a drafter hands to the target: candidates, and the distributions they were drawn from.

    Attributes:
        shape: the tree, ``n`` nodes.
        tokens: int64 ``[B, n]``.
        valid: bool ``[B, n]``: false where the draft had no candidate; such a node is never judged.
        choice: int64 ``[B, n]``: index of the node's token in its parent's support, 0 where it is not valid; unused
            without ``q``.
        q: support and weights ``[B, 1 + n, S]`` by column (root first): for inner nodes the very tensors the
            candidates were drawn from, for leaves any support and zero weights. None for candidates that were not
            drawn: they are judged by sampling the target and looking.
        failed: bool ``[B]``: rows for which the draft gave no distribution.
    """

    shape: TreeShape
    tokens: Tensor
    valid: Tensor
    choice: Tensor
    q: SparseDistributions | None
    failed: Tensor

    @classmethod
    def none(cls, rows: int, device: torch.device) -> "CandidateTree":
        """No candidates: plain decoding."""
        tokens, valid = torch.zeros(rows, 0, dtype=torch.int64, device=device), torch.zeros(rows, 0, dtype=torch.bool)
        failed = torch.zeros(rows, dtype=torch.bool, device=device)
        return cls(TreeShape.parse("none"), tokens, valid.to(device), tokens, None, failed)


@dataclass(frozen=True)
class Node:
    """One node of each of A rows, with its children, as the judgement sees it.

    Attributes:
        p: ``[A, V]``, the target's distribution after the node.
        tokens: int64 ``[A, k]``, the candidates in draw order.
        valid: bool ``[A, k]``.
        count: int64 ``[A]``, children that the tree's shape gives the node, valid or not; the first ones of the k.
        choice: int64 ``[A, k]``, their places in the support; q: ``[A, S]`` as in `CandidateTree`, of no tokens where
            candidates were not drawn.
        rows: int64 ``[A]``, which rows of the batch these are.
    """

    p: Tensor
    tokens: Tensor
    valid: Tensor
    count: Tensor
    choice: Tensor
    q: SparseDistributions
    rows: Tensor


@dataclass(frozen=True)
class Verdict:
    """The judgement of a batch of trees.

    Attributes:
        path: int64 ``[B, depth]``, the accepted nodes, padded with -1.
        accepted: int64 ``[B]``, how many.
        token: int64 ``[B]``, the token the target adds after the path.
        failed: bool ``[B]``, rows for which the target gave no distribution after the path, or the draft none at
            all. Their path counts, their token does not.
    """

    path: Tensor
    accepted: Tensor
    token: Tensor
    failed: Tensor


@dataclass(frozen=True)
class Texts:
    """The token ids so far of each row, for settings that depend on them (penalties).

    Attributes:
        prompts: the prompts; texts: what has been emitted since.
    """

    prompts: list[list[int]]
    texts: list[list[int]]


class Scheme(ABC):
    """A draw and the judgement that belongs to it. Lossless: the emitted tokens follow the target's law."""

    name: ClassVar[str]
    needs_q: ClassVar[bool] = True
    """Whether the judgement reads q. A scheme that does not can judge candidates that were not drawn at all."""
    widest: ClassVar[int | None] = None
    """The most children of a node that it can judge; None: any number."""
    deepest: ClassVar[int | None] = None
    """The deepest tree that it can judge; None: any."""

    @classmethod
    def check(cls, shape: TreeShape) -> None:
        """Whether the scheme can run a tree.

        Raises:
            InvalidTree: a node has more children than the scheme knows how to judge, or the tree is too deep for it.
        """
        if cls.deepest is not None and shape.depth > cls.deepest:
            raise InvalidTree(
                f"scheme {cls.name} judges trees of depth {cls.deepest}, and tree {shape!s:.80} has {shape.depth}",
                "give a tree that is less deep, or another scheme",
            )
        width = shape.children.shape[1]
        if cls.widest is not None and width > cls.widest:
            what = "chains" if cls.widest == 1 else f"up to {cls.widest} candidates for a position"
            raise InvalidTree(
                f"scheme {cls.name} judges {what}, and tree {shape!s:.80} has up to {width}",
                f"give a narrower tree, such as {'chain:4' if cls.widest == 1 else '2x2x1'}, or another scheme",
            )

    @classmethod
    def judges(cls, shape: TreeShape) -> bool:
        """Whether `check` has nothing against a tree."""
        try:
            cls.check(shape)
        except InvalidTree:
            return False
        return True

    @abstractmethod
    def draw(self, q: Tensor, counts: Sequence[int], greedy: Tensor, random: Randomness) -> Tensor:
        """Choose candidates.

        Args:
            q: ``[B, N, S]``, the draft's distribution at N nodes of each row.
            counts: how many children each of the N nodes has.
            greedy: bool ``[B]``, rows at temperature 0, whose candidates are the likeliest ones.
            random: the drawing stream.

        Returns:
            int64 ``[B, N, max(counts)]`` indices into the support in draw order, -1 where there is no candidate. What
            stands beyond a node's own count is not used.
        """

    def judge(
        self, tree: CandidateTree, logits: Tensor, settings: Settings, texts: Texts, random: Randomness
    ) -> Verdict:
        """Accept a path, and emit a token after it.

        Args:
            tree: the candidates.
            logits: ``[B, 1 + n, V]`` of the target, root first.
            settings: of the B rows.
            texts: what penalties need.
            random: the judging stream. It is asked for the same numbers of decisions whatever the outcome, so that
                each row's later decisions do not depend on the other rows.
        """
        target = Target(tree, logits, settings, texts)
        if settings.all_greedy:
            # Every scheme comes to this where p is one-hot; here it costs no random numbers.
            return walk_greedily(target)
        if tree.q is None:
            return walk(target, lambda node: sample_then_look(node, random))
        return self._judge(target, tree.q, random)

    @abstractmethod
    def _judge(self, target: "Target", q: SparseDistributions, random: Randomness) -> Verdict:
        """`judge`, where not all rows are greedy and candidates were drawn from ``q``."""


class IndependentDraws(Scheme):
    """k independent draws from q: candidates may be equal."""

    def draw(self, q: Tensor, counts: Sequence[int], greedy: Tensor, random: Randomness) -> Tensor:
        """See `Scheme.draw`."""
        return likeliest_where(greedy, q, max(counts), random.sample)


class DrawsWithoutReplacement(Scheme):
    """k draws from q, each leaving out the ones before it."""

    def draw(self, q: Tensor, counts: Sequence[int], greedy: Tensor, random: Randomness) -> Tensor:
        """See `Scheme.draw`."""
        return likeliest_where(greedy, q, max(counts), random.sample_without_replacement)


class NodeScheme(Scheme):
    """A scheme that judges node by node, from the root down."""

    @abstractmethod
    def judge_node(self, node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
        """Accept one child, or none.

        Returns:
            int64 ``[A]``: the accepted child's place among the children, or -1; and int64 ``[A]``: the token to emit
            where it is -1.
        """

    def _judge(self, target: "Target", q: SparseDistributions, random: Randomness) -> Verdict:
        greedy = target.settings.greedy
        mixed = target.settings.any_greedy

        def decide(node: Node) -> tuple[Tensor, Tensor]:
            judged = self.judge_node(node, random) if node.tokens.shape[1] else sample_then_look(node, random)
            picked, token = judged
            if not mixed:
                return picked, token
            # Candidates of greedy rows were not drawn but chosen, and p is one-hot.
            cold = greedy[node.rows]
            found, best = look(node, node.p.argmax(-1))
            return torch.where(cold, found, picked), torch.where(cold, best, token)

        return walk(target, decide)


@dataclass(frozen=True)
class Target:
    """What a judgement knows: the candidates, and the target's distribution wherever it asks for it.

    Attributes:
        tree, logits, settings, texts: as in `Scheme.judge`.
    """

    tree: CandidateTree
    logits: Tensor
    settings: Settings
    texts: Texts

    def after(self, columns: Tensor, paths: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The target's distribution after some nodes, one for each of A rows.

        Args:
            columns: int64 ``[A]``, root 0, node i is 1 + i.
            paths: int64 ``[A, depth]``, the nodes from the root to each of them, padded with -1.
            rows: int64 ``[A]``, of the batch.

        Returns:
            ``[A, V]``, and bool ``[A]``: where there is no distribution, but NaN or nothing.
        """
        p = probabilities(self.logits_after(columns, paths, rows), self.settings.select(rows))
        return p, p.sum(-1).isnan()

    def logits_after(self, columns: Tensor, paths: Tensor, rows: Tensor) -> Tensor:
        """``[A, V]``, penalties and bias in them; see `after`."""
        which = rows.tolist()
        # Taking a single row by index would copy it, which takes as long as a softmax.
        logits = self.logits[rows, columns] if len(which) != 1 else self.logits[which[0], int(columns)][None]
        each = []
        for i, row in enumerate(which):
            params = self.settings.params[row]
            if params.shapes_logits:
                on_path = [int(self.tree.tokens[row, node]) for node in paths[i].tolist() if node >= 0]
                shaped = shape_logits(logits[i], params, self.texts.prompts[row], self.texts.texts[row] + on_path)
                each.append((i, shaped))
        if each:
            logits = logits.to(each[0][1].dtype, copy=True)
            for i, shaped in each:
                logits[i] = shaped
        return logits


def walk(target: Target, decide: Callable[[Node], tuple[Tensor, Tensor]]) -> Verdict:
    """Go down from the root, level by level; softmax only for nodes that are reached.

    Args:
        target: the candidates and the target's distributions.
        decide: as `NodeScheme.judge_node`. Nodes have as many children as the widest of their level, perhaps none.
    """
    way = _Way(target.tree)
    for width in (*target.tree.shape.widths, 0):
        if not way.rows:
            break
        at = way.at()
        p, broken = target.after(at[:, 1], at[:, 2:], at[:, 0])
        if True in (lost := broken.tolist()):
            way.fail(lost)
            at, p = at[~broken], p[~broken]
        below = [way.children(row)[:width] for row in way.rows]
        kids = torch.tensor(below, dtype=torch.int64, device=p.device).view(len(at), width)
        picked, token = decide(_node(target.tree, at[:, 0], at[:, 1], kids, p))
        chosen = [nodes[place] if place >= 0 else None for nodes, place in zip(below, picked.tolist(), strict=True)]
        way.go_on(chosen, token.tolist())
    return way.verdict()


def walk_greedily(target: Target) -> Verdict:
    """`walk` where all rows are greedy: from each node to the child that is the likeliest token, if there is one."""
    tree = target.tree
    tokens, valid = tree.tokens.tolist(), tree.valid.tolist()
    way = _Way(tree)
    while way.rows:
        at = way.at()
        values, best = likeliest_tokens(target.logits_after(at[:, 1], at[:, 2:], at[:, 0]))
        lost = [not isfinite(value) for value in values.tolist()]
        likeliest = [token for token, none in zip(best.tolist(), lost, strict=True) if not none]
        way.fail(lost)
        chosen = []
        for row, token in zip(way.rows, likeliest, strict=True):
            kids = [node for node in way.children(row) if node >= 0 and valid[row][node]]
            chosen.append(next((node for node in kids if tokens[row][node] == token), None))
        way.go_on(chosen, likeliest)
    return way.verdict()


class _Way:
    """How far each row of a batch has come on its way down a tree.

    Attributes:
        rows: those that go on.
    """

    def __init__(self, tree: CandidateTree) -> None:
        self._device, self._depth = tree.tokens.device, tree.shape.depth
        self._children = tree.shape.children.tolist()
        self._failed: list[bool] = tree.failed.tolist()
        batch = len(self._failed)
        self._path = [[-1] * self._depth for _ in range(batch)]
        self._column, self._accepted, self._token = [0] * batch, [0] * batch, [0] * batch
        self.rows = [row for row in range(batch) if not self._failed[row]]

    def at(self) -> Tensor:
        """int64 ``[A, 2 + depth]``: the rows, the column that each has come to, and its path."""
        return torch.tensor([(row, self._column[row], *self._path[row]) for row in self.rows], device=self._device)

    def children(self, row: int) -> list[int]:
        """The nodes below a row's, padded with -1."""
        return self._children[self._column[row]]  # type: ignore[no-any-return]

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
            self._column[row] = 1 + node
            on.append(row)
        self.rows = on

    def verdict(self) -> Verdict:
        """When all have ended."""
        path = torch.tensor(self._path, dtype=torch.int64, device=self._device).view(len(self._path), self._depth)
        counts = torch.tensor([self._accepted, self._token], dtype=torch.int64, device=self._device)
        return Verdict(path, counts[0], counts[1], torch.tensor(self._failed, dtype=torch.bool, device=self._device))


def _node(tree: CandidateTree, rows: Tensor, at: Tensor, kids: Tensor, p: Tensor) -> Node:
    there = kids >= 0
    count = there.sum(-1)
    childless = not kids.shape[1]
    if tree.q is None or childless:
        q = SparseDistributions(kids[:, :0], p[:, :0])
    else:
        q = SparseDistributions(tree.q.support[rows, at], tree.q.weights[rows, at])
    if childless:
        return Node(p, kids, there, count, kids, q, rows)
    own, nodes = rows[:, None], kids.clamp(min=0)
    return Node(p, tree.tokens[own, nodes], there & tree.valid[own, nodes], count, tree.choice[own, nodes], q, rows)


def look(node: Node, token: Tensor) -> tuple[Tensor, Tensor]:
    """Accept the first child that is ``token``, int64 ``[A]``; see `NodeScheme.judge_node` for what is returned."""
    hit = (node.tokens == token[:, None]) & node.valid
    first = torch.nn.functional.pad(hit, (0, 1), value=True).to(torch.int8).argmax(-1)
    return first.masked_fill(first == hit.shape[1], -1), token


def sample_then_look(node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
    """Sample y from the target and accept y if it is a child: right for candidates however they came about."""
    return look(node, random.sample(node.p[:, None], 1, node.rows)[:, 0, 0])


def likeliest_where(greedy: Tensor, q: Tensor, count: int, draw: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`likeliest` for greedy rows and ``draw(q, count)`` for the others; where there are no others it is not called."""
    cold = greedy.tolist()
    if True not in cold:
        return draw(q, count)
    best = likeliest(q, count)
    return best if all(cold) else torch.where(greedy[:, None, None], best, draw(q, count))


def likeliest(q: Tensor, count: int) -> Tensor:
    """int64 ``[B, N, count]``: the likeliest entries of ``q [B, N, S]``, likeliest first, -1 where S is used up."""
    top = q.topk(min(count, q.shape[-1]), dim=-1).indices
    return torch.nn.functional.pad(top, (0, count - top.shape[-1]), value=-1)
