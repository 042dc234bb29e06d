"""What a scheme is: a way to draw candidates and the judgement that belongs to it. Knows no model and no text.

Most published bugs pair the draw of one law with the judgement of another, so a scheme owns both halves. All
randomness goes through `mcsd.rng.Randomness`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mcsd.rng import Randomness
from mcsd.sampling import Settings, SparseDistributions, probabilities, shape_logits
from mcsd.tree import TreeShape


@dataclass(frozen=True)
class CandidateTree:
    """What a drafter hands to the target: candidates, and the distributions they were drawn from.

    Attributes:
        shape: the tree, ``n`` nodes.
        tokens: int64 ``[B, n]``.
        valid: bool ``[B, n]``: false where the draft had no candidate; such a node is never judged.
        choice: int64 ``[B, n]``: index of the node's token in its parent's support; unused without ``q``.
        q: support and weights ``[B, 1 + n, S]`` by column (root first): for inner nodes the very tensors the
            candidates were drawn from, for leaves any support and zero weights. None for candidates that were not
            drawn, which only a scheme that ignores q can judge.
        failed: bool ``[B]``: rows for which the draft gave no distribution.
    """

    shape: TreeShape
    tokens: Tensor
    valid: Tensor
    choice: Tensor
    q: SparseDistributions | None
    failed: Tensor


@dataclass(frozen=True)
class Node:
    """One node of each of A rows, with its children, as the judgement sees it.

    Attributes:
        p: ``[A, V]``, the target's distribution after the node.
        tokens: int64 ``[A, k]``, the candidates in draw order.
        valid: bool ``[A, k]``.
        choice: int64 ``[A, k]``, their places in the support; q: ``[A, S]`` as in `CandidateTree`.
        rows: int64 ``[A]``, which rows of the batch these are.
    """

    p: Tensor
    tokens: Tensor
    valid: Tensor
    choice: Tensor
    q: SparseDistributions | None
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

    @abstractmethod
    def draw(self, q: Tensor, count: int, greedy: Tensor, random: Randomness) -> Tensor:
        """Choose candidates.

        Args:
            q: ``[B, N, S]``, the draft's distribution at N nodes of each row.
            count: children for each node.
            greedy: bool ``[B]``, rows at temperature 0, whose candidates are the likeliest ones.
            random: the drawing stream.

        Returns:
            int64 ``[B, N, count]`` indices into the support in draw order, -1 where there is no candidate.
        """

    @abstractmethod
    def judge_node(self, node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
        """Accept one child, or none.

        Asks ``random`` for the same numbers of decisions whatever the outcome, so that each row's later decisions
        do not depend on the other rows.

        Returns:
            int64 ``[A]``: the accepted child's place among the children, or -1; and int64 ``[A]``: the token to emit
            where it is -1.
        """

    def judge(
        self, tree: CandidateTree, logits: Tensor, settings: Settings, texts: Texts, random: Randomness
    ) -> Verdict:
        """Walk down from the root, level by level; softmax only for nodes that are reached.

        Args:
            tree: the candidates.
            logits: ``[B, 1 + n, V]`` of the target, root first.
            settings: of the B rows.
            texts: what penalties need.
            random: the judging stream.
        """
        batch, device = len(logits), logits.device
        children = tree.shape.children.to(device)
        path = torch.full((batch, tree.shape.depth), -1, dtype=torch.int64, device=device)
        column, accepted, token = torch.zeros(3, batch, dtype=torch.int64, device=device)
        failed = tree.failed.clone()
        greedy = bool(settings.greedy.all())
        rows = (~failed).nonzero()[:, 0]
        for depth in range(tree.shape.depth + 1):
            at = column[rows]
            p = self._target(logits[rows, at], settings.select(rows), tree, path, texts, rows)
            broken = ~(p.sum(-1) - 1).abs().lt(1e-3)
            failed[rows[broken]] = True
            rows, at, p = rows[~broken], at[~broken], p[~broken]
            kids = children[at]
            nodes = kids.clamp(min=0)
            q = tree.q and SparseDistributions(tree.q.support[rows, at], tree.q.weights[rows, at])
            own = rows[:, None]
            valid = (kids >= 0) & tree.valid[own, nodes] if len(tree.shape) else kids >= 0
            tokens, choice = (tree.tokens[own, nodes], tree.choice[own, nodes]) if len(tree.shape) else (kids, kids)
            node = Node(p, tokens, valid, choice, q, rows)
            # Every scheme comes to this where p is one-hot; here it costs no random numbers.
            picked, emitted = look(node, p.argmax(-1)) if greedy else self.judge_node(node, random)
            stay = picked < 0
            token[rows[stay]] = emitted[stay]
            rows, child = rows[~stay], kids[~stay].gather(1, picked[~stay, None])[:, 0]
            if not len(rows):
                break
            path[rows, depth] = child
            column[rows] = child + 1
            accepted[rows] += 1
        return Verdict(path, accepted, token, failed)

    @staticmethod
    def _target(
        logits: Tensor, settings: Settings, tree: CandidateTree, path: Tensor, texts: Texts, rows: Tensor
    ) -> Tensor:
        for i, (row, params) in enumerate(zip(rows.tolist(), settings.params, strict=True)):
            if params.shapes_logits:
                on_path = [int(tree.tokens[row, node]) for node in path[row].tolist() if node >= 0]
                shaped = shape_logits(logits[i], params, texts.prompts[row], texts.texts[row] + on_path)
                logits = logits.to(shaped.dtype)
                logits[i] = shaped
        return probabilities(logits, settings)


def look(node: Node, token: Tensor) -> tuple[Tensor, Tensor]:
    """Accept the first child that is ``token``, int64 ``[A]``; see `Scheme.judge_node` for what is returned."""
    hit = (node.tokens == token[:, None]) & node.valid
    first = torch.nn.functional.pad(hit, (0, 1), value=True).to(torch.int8).argmax(-1)
    return first.masked_fill(first == hit.shape[1], -1), token


def likeliest_where(greedy: Tensor, q: Tensor, count: int, draw: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`likeliest` for greedy rows and ``draw(q, count)`` for the others; where there are no others it is not called."""
    best = likeliest(q, count)
    return best if greedy.all() else torch.where(greedy[:, None, None], best, draw(q, count))


def likeliest(q: Tensor, count: int) -> Tensor:
    """int64 ``[B, N, count]``: the likeliest entries of ``q [B, N, S]``, likeliest first, -1 where S is used up."""
    top = q.topk(min(count, q.shape[-1]), dim=-1).indices
    return torch.nn.functional.pad(top, (0, count - top.shape[-1]), value=-1)
