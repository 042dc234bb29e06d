"""What is drawn and judged: candidates, the target's distributions, and the verdict."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mcsd.sampling import Settings, SparseDistributions, probabilities, shape_logits
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
            drawn, looked-up ones and those of rows that are all greedy: they are judged by sampling the target and
            looking.
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
        return p, p[:, 0].isnan()

    def logits_after(self, columns: Tensor, paths: Tensor, rows: Tensor) -> Tensor:
        """``[A, V]``, penalties and bias in them; see `after`."""
        which = rows.tolist()
        # Taking a single row by index would copy it, which takes half as long as a softmax.
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
