"""What a scheme is: a way to draw candidates and the judgement that belongs to it. Knows no model and no text.

Most published bugs pair the draw of one law with the judgement of another, so a scheme owns both halves. All
randomness goes through `mcsd.rng.Randomness`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mcsd.errors import InvalidTree
from mcsd.rng import Randomness
from mcsd.sampling import Settings, SparseDistributions
from mcsd.schemes.candidates import CandidateTree, Node, Target, Texts, Verdict
from mcsd.schemes.walk import look, sample_then_look, walk, walk_greedily
from mcsd.tree import TreeShape


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
            q: ``[B, N, S]``, the draft's distribution at N nodes of each row; where all rows are greedy, of no more
                tokens than the widest node has children.
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
        """Accept one child, or none. There is room for one at least.

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
