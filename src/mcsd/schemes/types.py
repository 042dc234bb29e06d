"""Data that schemes read and return: candidates, the target's distributions, the result of a verification."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from mcsd.grammars import mask_tokens
from mcsd.sampling import BatchSamplingParams, Penalties, SparseDistributions, apply_penalties, probabilities
from mcsd.schemes.mixed_shape import MixedShape
from mcsd.tree import PLAIN, TreeShape


@cache
def children_of(shape: TreeShape, device: torch.device) -> Tensor:
    """`TreeShape.children` on a device."""
    return shape.children.to(device)


@cache
def paths_of(shape: TreeShape, device: torch.device) -> Tensor:
    """`TreeShape.paths` on a device."""
    return shape.paths.to(device)


@dataclass(frozen=True)
class CandidateTree:
    """What a drafter proposes: candidates, and the distributions they were drawn from.

    Attributes:
        shape: the tree, ``n`` nodes.
        tokens: int64 ``[B, n]``.
        valid: bool ``[B, n]``: false where the draft had no candidate; such a node is never verified.
        choice: int64 ``[B, n]``: index of the node's token in its parent's support, 0 where it is not valid; unused
            without ``q``.
        q: support and weights ``[B, 1 + n, S]`` by column (root first): for inner nodes the very tensors the
            candidates were drawn from, for leaves any support and zero weights. None if candidates were not drawn from
            a distribution (n-gram look-up, or all sequences greedy): the target is sampled and matched then.
        failed: bool ``[B]``: sequences for which the draft gave no distribution.
        mixed: if a chain of looked-up tokens is part of the tree; its nodes have no ``choice``.
    """

    shape: TreeShape
    tokens: Tensor
    valid: Tensor
    choice: Tensor
    q: SparseDistributions | None
    failed: Tensor
    mixed: MixedShape | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors."""
        q = () if self.q is None else (self.q.support, self.q.weights)
        return self.tokens, self.valid, self.choice, self.failed, *q

    def with_tensors(self, tensors: Sequence[Tensor]) -> "CandidateTree":
        """A tree of the same shape with other `tensors`."""
        return self.of(self.key, tensors)

    @classmethod
    def of(cls, shape: TreeShape | MixedShape, tensors: Sequence[Tensor]) -> "CandidateTree":
        """A tree from its `tensors`."""
        tokens, valid, choice, failed, *q = tensors
        mixed = shape if isinstance(shape, MixedShape) else None
        whole = shape.shape if isinstance(shape, MixedShape) else shape
        return cls(whole, tokens, valid, choice, SparseDistributions(*q) if q else None, failed, mixed)

    def without(self, sequences: Tensor) -> "CandidateTree":
        """The tree without the candidates of some sequences, bool ``[B]``."""
        return replace(self, valid=self.valid & ~sequences[:, None], failed=self.failed & ~sequences)

    @property
    def key(self) -> TreeShape | MixedShape:
        """What verification depends on besides `tensors`."""
        return self.mixed or self.shape

    @classmethod
    def none(cls, batch: int, device: torch.device) -> "CandidateTree":
        """No candidates: plain decoding."""
        tokens = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        failed = torch.zeros(batch, dtype=torch.bool, device=device)
        return cls(PLAIN, tokens, tokens.bool(), tokens, None, failed)


@dataclass(frozen=True)
class Node:
    """One node of each of A sequences, with its children.

    Attributes:
        p: ``[A, V]``, the target's distribution after the node.
        tokens: int64 ``[A, k]``, the candidates in draw order.
        valid: bool ``[A, k]``.
        count: int64 ``[A]``, children that the tree's shape gives the node, valid or not; the first ones of the k.
        choice: int64 ``[A, k]``, their indices in the support; q: ``[A, S]`` as in `CandidateTree`, with S = 0 where
            candidates were not drawn.
        sequences: int64 ``[A]``, indices in the batch.
        level: depth of the node.
        looked_up: bool ``[A]``, whether the first child was looked up and not drawn; None if it was for no node.
    """

    p: Tensor
    tokens: Tensor
    valid: Tensor
    count: Tensor
    choice: Tensor
    q: SparseDistributions
    sequences: Tensor
    level: int
    looked_up: Tensor | None


@dataclass(frozen=True)
class VerificationResult:
    """The result of verifying a batch of trees.

    Attributes:
        path: int64 ``[B, depth]``, the accepted nodes, padded with -1.
        accepted: int64 ``[B]``, how many.
        token: int64 ``[B]``, the token the target adds after the path.
        failed: bool ``[B]``, sequences for which the target gave no distribution after the path, or the draft none at
            all. Their path is valid, their token is not.
    """

    path: Tensor
    accepted: Tensor
    token: Tensor
    failed: Tensor

    def to(self, device: torch.device) -> "VerificationResult":
        """The result on a device."""
        return VerificationResult(*(each.to(device) for each in (self.path, self.accepted, self.token, self.failed)))

    @property
    def columns(self) -> Tensor:
        """int64 ``[B, 1 + depth]``: the columns of the root and the accepted nodes, padded with the root's."""
        return torch.nn.functional.pad(self.path + 1, (1, 0), value=0)

    def emitted(self, tree: CandidateTree) -> Tensor:
        """int64 ``[B, 1 + depth]``: the tokens of the accepted nodes, then the target's own; arbitrary after it."""
        on_path = tree.tokens.gather(1, self.path.clamp(min=0))
        return torch.nn.functional.pad(on_path, (0, 1)).scatter(1, self.accepted[:, None], self.token[:, None])

    def table(self, tree: CandidateTree) -> Tensor:
        """int64 ``[B, 4 + 2 * depth]``: all that the host needs, in one tensor; see `VerifiedSequence.read`."""
        counts = torch.stack([self.accepted, self.failed, tree.valid.sum(-1)], dim=1)
        return torch.cat([counts, self.path, self.emitted(tree)], dim=1)


@dataclass(frozen=True)
class VerifiedSequence:
    """The result of verifying one tree, on the host.

    Attributes:
        path: the accepted nodes.
        tokens: their tokens and the one that the target adds; without that one if the verification has failed.
        drafted: candidates that were verified.
    """

    path: list[int]
    tokens: list[int]
    drafted: int

    @classmethod
    def read(cls, table: Tensor) -> list["VerifiedSequence"]:
        """Each sequence's result from `VerificationResult.table`, in a single read from the device."""
        depth = table.shape[1] // 2 - 2
        return [
            cls(rest[:accepted], rest[depth : depth + accepted + (not failed)], drafted)
            for accepted, failed, drafted, *rest in table.tolist()
        ]

    @property
    def failed(self) -> bool:
        """See `VerificationResult.failed`."""
        return len(self.tokens) == len(self.path)


@dataclass
class TokenHistory:
    """The token ids of each sequence so far, for penalties.

    On a GPU they are counted there, so a history lives as long as its batch and is told what each step emits.

    Attributes:
        prompts: the prompts; generated: the tokens emitted since.
    """

    prompts: list[list[int]]
    generated: list[list[int]]
    _penalties: Penalties | None = field(default=None, init=False)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the penalties."""
        return () if self._penalties is None else self._penalties.tensors

    def with_tensors(self, tensors: Sequence[Tensor]) -> "TokenHistory":
        """A copy with other `tensors`."""
        history = TokenHistory(self.prompts, self.generated)
        history._penalties = self._penalties and self._penalties.with_tensors(tensors)
        return history

    def penalties(self, sampling: BatchSamplingParams, logits: Tensor) -> Penalties:
        """The penalties after the tokens so far, for logits ``[..., V]``."""
        if self._penalties is None:
            size = logits.shape[-1]
            self._penalties = Penalties.of(sampling.params, self.prompts, self.generated, size, logits.device)
        return self._penalties

    def append(self, tree: CandidateTree, result: VerificationResult) -> None:
        """Count the tokens that a step emits. ``generated`` is extended by its owner."""
        if self._penalties is not None:
            tokens = result.emitted(tree)
            index = torch.arange(tokens.shape[1], device=tokens.device)
            self._penalties = self._penalties.after(tokens, index <= result.accepted[:, None])


@dataclass(frozen=True)
class TargetDistributions:
    """The candidates, and the target's distribution after any of them, computed on request.

    Attributes:
        tree, logits, sampling, history: as in `mcsd.schemes.base.Scheme.verify`.
    """

    tree: CandidateTree
    logits: Tensor
    sampling: BatchSamplingParams
    history: TokenHistory

    def after(self, columns: Tensor, paths: Tensor, sequences: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The target's distribution after some nodes, one for each of A sequences.

        Args:
            columns: int64 ``[A]``, root 0, node i is 1 + i.
            paths: int64 ``[A, depth]``, the nodes from the root to each of them, padded with -1.
            sequences: int64 ``[A]``, indices in the batch; None for all of the batch. On a GPU all.

        Returns:
            ``[A, V]``, and bool ``[A]``: where it is not a distribution but NaN.
        """
        sampling = self.sampling if sequences is None else self.sampling.select(sequences)
        p = probabilities(self.logits_after(columns, paths, sequences), sampling)
        return p, p[:, 0].isnan()

    def logits_after(self, columns: Tensor, paths: Tensor, sequences: Tensor | None = None) -> Tensor:
        """``[A, V]``, with penalties, bias, processors and grammars; see `after`."""
        if sequences is None:
            sequences = torch.arange(len(columns), device=columns.device)
        if self.logits.device.type == "cpu":
            return self._logits_on_host(columns, paths, sequences)
        logits = self.logits[sequences, columns]
        if not self.sampling.any_penalties:
            return logits
        on_path = self.tree.tokens.gather(1, paths.clamp(min=0))
        return self.history.penalties(self.sampling, logits).after(on_path, paths >= 0).apply(logits)

    def _logits_on_host(self, columns: Tensor, paths: Tensor, sequences: Tensor) -> Tensor:
        indices = sequences.tolist()
        # Indexing with tensors copies the row, which takes half as long as a softmax.
        logits = self.logits[sequences, columns] if len(indices) != 1 else self.logits[indices[0], int(columns)][None]
        if not self.sampling.any_penalties:
            return logits
        penalised = []
        nodes = zip(self.tree.tokens[sequences].tolist(), paths.tolist(), strict=True)
        on_path = [[tokens[node] for node in path if node >= 0] for tokens, path in nodes]
        for i, sequence in enumerate(indices):
            params = self.sampling.params[sequence]
            if params.changes_logits:
                prompt, text = self.history.prompts[sequence], self.history.generated[sequence] + on_path[i]
                penalised.append((i, apply_penalties(logits[i], params, prompt, text)))
        if penalised:
            logits = logits.to(penalised[0][1].dtype, copy=True)
            for i, values in penalised:
                logits[i] = values
        if not self.sampling.any_grammars:
            return logits
        matchers = [self.sampling.matchers[sequence] for sequence in indices]
        logits = mask_tokens(logits, matchers, on_path)
        if failed := [i for i, matcher in enumerate(matchers) if matcher and matcher.error]:
            logits = logits.index_fill(0, torch.tensor(failed), torch.nan)
        return logits
