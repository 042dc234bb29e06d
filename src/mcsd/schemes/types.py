"""Data that schemes read and return: candidates, the target's distributions, the result of a verification."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mcsd.sampling import BatchSamplingParams, SparseDistributions, apply_penalties, probabilities
from mcsd.tree import TreeShape


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
    """

    shape: TreeShape
    tokens: Tensor
    valid: Tensor
    choice: Tensor
    q: SparseDistributions | None
    failed: Tensor

    @classmethod
    def none(cls, batch: int, device: torch.device) -> "CandidateTree":
        """No candidates: plain decoding."""
        tokens, valid = torch.zeros(batch, 0, dtype=torch.int64, device=device), torch.zeros(batch, 0, dtype=torch.bool)
        failed = torch.zeros(batch, dtype=torch.bool, device=device)
        return cls(TreeShape.parse("none"), tokens, valid.to(device), tokens, None, failed)


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
    """

    p: Tensor
    tokens: Tensor
    valid: Tensor
    count: Tensor
    choice: Tensor
    q: SparseDistributions
    sequences: Tensor


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


@dataclass(frozen=True)
class TokenHistory:
    """The token ids of each sequence so far, for penalties.

    Attributes:
        prompts: the prompts; generated: the tokens emitted since.
    """

    prompts: list[list[int]]
    generated: list[list[int]]


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

    def after(self, columns: Tensor, paths: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """The target's distribution after some nodes, one for each of A sequences.

        Args:
            columns: int64 ``[A]``, root 0, node i is 1 + i.
            paths: int64 ``[A, depth]``, the nodes from the root to each of them, padded with -1.
            sequences: int64 ``[A]``, indices in the batch.

        Returns:
            ``[A, V]``, and bool ``[A]``: where it is not a distribution but NaN.
        """
        p = probabilities(self.logits_after(columns, paths, sequences), self.sampling.select(sequences))
        return p, p[:, 0].isnan()

    def logits_after(self, columns: Tensor, paths: Tensor, sequences: Tensor) -> Tensor:
        """``[A, V]``, with penalties and bias; see `after`."""
        indices = sequences.tolist()
        # Indexing with tensors copies the row, which takes half as long as a softmax.
        logits = self.logits[sequences, columns] if len(indices) != 1 else self.logits[indices[0], int(columns)][None]
        penalised = []
        for i, sequence in enumerate(indices):
            params = self.sampling.params[sequence]
            if params.changes_logits:
                on_path = [int(self.tree.tokens[sequence, node]) for node in paths[i].tolist() if node >= 0]
                prompt, text = self.history.prompts[sequence], self.history.generated[sequence] + on_path
                penalised.append((i, apply_penalties(logits[i], params, prompt, text)))
        if penalised:
            logits = logits.to(penalised[0][1].dtype, copy=True)
            for i, values in penalised:
                logits[i] = values
        return logits
