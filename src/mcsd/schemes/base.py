"""A scheme: a way to draw candidates and the verification that belongs to it. Knows no model and no text.

Many published bugs pair the draw of one scheme with the verification of another, so a scheme owns both. All randomness
goes through `mcsd.rng.Randomness`. Names and limits of the schemes are in `mcsd.schemes.registry`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from mcsd.rng import Randomness
from mcsd.sampling import BatchSamplingParams, SparseDistributions
from mcsd.schemes.mixed import verify_mixed
from mcsd.schemes.node_level import match, sample_and_match, verify_greedy, verify_nodes
from mcsd.schemes.types import CandidateTree, Node, TargetDistributions, TokenHistory, VerificationResult


class Scheme(ABC):
    """A draw and its verification. Lossless: the emitted tokens follow the target's distribution."""

    name: ClassVar[str]
    needs_q: ClassVar[bool] = True
    """Whether verification reads q. A scheme that does not can verify candidates that were not drawn at all."""

    @abstractmethod
    def draw(self, q: Tensor, counts: Sequence[int], sampling: BatchSamplingParams, random: Randomness) -> Tensor:
        """Choose candidates.

        Args:
            q: ``[B, N, S]``, the draft's distribution at N nodes of each sequence; if all sequences are greedy, S is
                only the most children of a node.
            counts: the number of children of each of the N nodes.
            sampling: of the B sequences; candidates of greedy ones are the top k of q.
            random: the `mcsd.rng.DRAW` stream.

        Returns:
            int64 ``[B, N, max(counts)]`` indices into the support in draw order, -1 where there is no candidate.
            Entries beyond a node's own count are not used.
        """

    def verify(
        self,
        tree: CandidateTree,
        logits: Tensor,
        sampling: BatchSamplingParams,
        history: TokenHistory,
        random: Randomness,
    ) -> VerificationResult:
        """Accept a path, and emit a token after it.

        Args:
            tree: the candidates.
            logits: ``[B, 1 + n, V]`` of the target, root first.
            sampling: of the B sequences.
            history: what penalties need.
            random: the `mcsd.rng.VERIFY` stream, or that of `mcsd.rng.SAMPLE` for a scheme that needs no q. The same
                numbers are drawn whatever the outcome, so that the later decisions of a sequence do not depend on the
                other sequences.
        """
        target = TargetDistributions(tree, logits, sampling, history)
        if sampling.all_greedy:
            # Every scheme comes to this where p is one-hot; here it costs no random numbers.
            return verify_greedy(target)
        if tree.q is None:
            return verify_nodes(target, lambda node: sample_and_match(node, random))
        if not sampling.any_plain:
            return self._verify(target, tree.q, random)
        # No scheme verifies candidates of a failed draft.
        others = replace(tree, failed=tree.failed | sampling.plain)
        result = self._verify(replace(target, tree=others), tree.q, random)
        return _without_candidates(result, target, random.again)

    @abstractmethod
    def _verify(self, target: TargetDistributions, q: SparseDistributions, random: Randomness) -> VerificationResult:
        """`verify`, if not all sequences are greedy and candidates were drawn from ``q``."""


class IndependentDraws(Scheme):
    """k independent draws from q: candidates may be equal."""

    def draw(self, q: Tensor, counts: Sequence[int], sampling: BatchSamplingParams, random: Randomness) -> Tensor:
        """See `Scheme.draw`."""
        return top_k_if_greedy(sampling, q, max(counts), random.sample)


class DrawsWithoutReplacement(Scheme):
    """k draws from q, each excluding the ones before it."""

    def draw(self, q: Tensor, counts: Sequence[int], sampling: BatchSamplingParams, random: Randomness) -> Tensor:
        """See `Scheme.draw`."""
        return top_k_if_greedy(sampling, q, max(counts), random.sample_without_replacement)


class NodeScheme(Scheme):
    """A scheme that verifies node by node, from the root down."""

    @abstractmethod
    def verify_node(self, node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
        """Accept one child, or none. The node has at least one child.

        Returns:
            int64 ``[A]``: the accepted child's index among the children, or -1; and int64 ``[A]``: the token to emit
            where it is -1.
        """

    def _verify(self, target: TargetDistributions, q: SparseDistributions, random: Randomness) -> VerificationResult:
        greedy = target.sampling.greedy
        drawn = target.tree.mixed.drawn.widths if target.tree.mixed else ()

        def verify_sampled(node: Node) -> tuple[Tensor, Tensor]:
            if not node.tokens.shape[1]:
                return sample_and_match(node, random)
            if node.looked_up is None or not self.needs_q:
                return self.verify_node(node, random)
            width = drawn[node.level] if node.level < len(drawn) else 0
            return verify_mixed(node, random, width, partial(self.verify_node, random=random))

        def verify_node(node: Node) -> tuple[Tensor, Tensor]:
            picked, token = verify_sampled(node)
            if not target.sampling.any_greedy:
                return picked, token
            # The candidates of greedy sequences are the top k, not draws, and p is one-hot.
            is_greedy = greedy[node.sequences]
            matched, best = match(node, node.p.argmax(-1))
            return torch.where(is_greedy, matched, picked), torch.where(is_greedy, best, token)

        return verify_nodes(target, verify_node)


def _without_candidates(
    result: VerificationResult, target: TargetDistributions, random: Randomness
) -> VerificationResult:
    """``result``, but for sequences that are decoded plainly: their token is sampled from p after the root."""
    plain = target.sampling.plain
    none = replace(CandidateTree.none(len(plain), plain.device), failed=~plain)
    at_root = replace(target, tree=none, logits=target.logits[:, :1])
    sampled = verify_nodes(at_root, lambda node: sample_and_match(node, random))
    return VerificationResult(
        result.path.masked_fill(plain[:, None], -1),
        result.accepted.masked_fill(plain, 0),
        torch.where(plain, sampled.token, result.token),
        torch.where(plain, sampled.failed, result.failed),
    )


def top_k_if_greedy(
    sampling: BatchSamplingParams, q: Tensor, count: int, draw: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """`top_k_indices` for greedy sequences, ``draw(q, count)`` for the others; not called if all are greedy."""
    if not sampling.any_greedy:
        return draw(q, count)
    best = top_k_indices(q, count)
    return best if sampling.all_greedy else torch.where(sampling.greedy[:, None, None], best, draw(q, count))


def top_k_indices(q: Tensor, count: int) -> Tensor:
    """int64 ``[B, N, count]``: the most probable entries of ``q [B, N, S]`` in descending order, padded with -1."""
    top = q.topk(min(count, q.shape[-1]), dim=-1).indices
    return torch.nn.functional.pad(top, (0, count - top.shape[-1]), value=-1)
