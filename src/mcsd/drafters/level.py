"""Drafting a tree level by level: one forward a level, q cut to its most probable tokens."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from mcsd.drafters.base import Drafter
from mcsd.grammars import mask_tokens
from mcsd.graphs import GraphCache
from mcsd.models import Cache, TokenLayout
from mcsd.models.prefix_cache import PrefixCache, TextsByBeginning, longest_common
from mcsd.rng import Randomness
from mcsd.sampling import BatchSamplingParams, SparseDistributions, sparse_probabilities
from mcsd.schemes import CandidateTree, Scheme
from mcsd.schemes.mixed_shape import MixedShape, order_of
from mcsd.tree import PLAIN, TreeShape

SUPPORT = 64
"""Tokens of the draft's distribution that candidates are drawn from."""

MAX_LAG = 32
"""The most pending tokens that sequences read together in one forward. A sequence that lags by more catches up alone:
in a batch, all sequences would be padded to its length."""

_PADDED_TO = 8


class LevelDrafter(Drafter):
    """Drafts from the logits that a subclass computes, one level after the other.

    Args:
        device: where it computes.
        vocabulary: int64 ``[K]``, the token id of each logit; None: the logit's own index.
        vocab_size: logits beyond this many are padding and are cut off.
        captures: whether drafting may be captured in CUDA graphs.

    Attributes:
        cache: of the draft.
        prefixes: the prefix cache of the draft.
        chains: looked-up tokens for the next draft, a list of equal length for each sequence, padded with -1: a chain
            that hangs at the root beside the candidates.
        tree: the shape of the last draft.
    """

    cache: Cache
    prefixes: PrefixCache
    chains: list[list[int]]
    tree: TreeShape | MixedShape = PLAIN

    def __init__(self, device: torch.device, vocabulary: Tensor | None, vocab_size: int, captures: bool) -> None:
        self.graphs = GraphCache(device, captures)
        self._device = device
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self.chains = []

    @property
    def sequences(self) -> int:
        """See `Drafter.sequences`."""
        return self.cache.batch_size

    def catch_up(self, token_ids: list[list[int]]) -> None:
        """See `Drafter.catch_up`: one sequence at a time, all tokens but the last."""
        read = TextsByBeginning()
        for sequence, tokens in enumerate(self._texts(token_ids)):
            if not self._lags(sequence, len(tokens)):
                continue
            length, text = self.cache.host_lengths[sequence], tokens[:-1]
            # What sequences have in common is read once.
            same, common = longest_common(text, read.like(text))
            if common > length:
                self.cache.copy(same, sequence, common)
            elif not length:
                self.prefixes.start(sequence, text)
            if (length := self.cache.host_lengths[sequence]) < len(text):
                self._prefill(sequence, text[length:])
            read.add(sequence, text)

    def _texts(self, token_ids: list[list[int]]) -> list[list[int]]:
        """What is read of the texts, in the draft's own tokens."""
        return token_ids

    def _lags(self, sequence: int, length: int) -> bool:
        """Whether a sequence of this length catches up alone, before a draft."""
        read = self.cache.host_lengths[sequence]
        return length > 1 and (not read or length - read > MAX_LAG)

    def keep(self, sequence: int, token_ids: list[int]) -> None:
        """See `Drafter.keep`."""
        self.prefixes.keep(sequence, token_ids)

    @abstractmethod
    def _prefill(self, sequence: int, tokens: list[int]) -> None:
        """Read and commit the first pending tokens of a sequence."""

    def _states_before(self, pending: "PendingTokens") -> tuple[Tensor, ...]:
        """What `_root_logits` needs besides the pending tokens."""
        return ()

    @abstractmethod
    def _root_logits(self, pending: "PendingTokens", *states: Tensor) -> Tensor:
        """Read and commit the pending tokens, the root included: logits ``[B, 1, K]`` after the root."""

    @abstractmethod
    def _level_logits(self, tokens: Tensor, level: "Level") -> Tensor:
        """Read the inner nodes of a level, ``tokens [B, N]``: logits ``[B, N, K]`` after them."""

    def draft(
        self,
        token_ids: list[list[int]],
        shape: TreeShape,
        scheme: Scheme,
        sampling: BatchSamplingParams,
        random: Randomness,
    ) -> CandidateTree:
        """See `Drafter.draft`."""
        chains, self.chains = self.chains, []
        self.tree = MixedShape(shape, len(chains[0])) if chains else shape
        if not len(shape):
            return CandidateTree.none(len(token_ids), self._device)
        texts = self._texts(token_ids)
        pending = PendingTokens.of(texts, self.cache.host_lengths, self._device, chains)
        columns = self.cache.reserve(pending.tokens.shape[1] + len(shape))
        key = "draft", self.tree, scheme.name, sampling.kind, columns
        levels = partial(self._draft_levels, shape, scheme)
        states = self._states_before(pending)
        if sampling.any_grammars:
            # The host follows the paths: this cannot be captured.
            drafted = levels(sampling, random, pending, *states)
        else:
            drafted = self.graphs.run(key, levels, sampling, random, pending, *states, generation=self.cache.generation)
        if len(shape) > drafted[0].shape[1]:
            # It has stopped early.
            self.tree = _cut(shape, shape.depths[drafted[0].shape[1] - 1])
        # They are longer already, unless a graph was replayed, which runs no code of the host.
        self.cache.host_lengths[: len(texts)] = map(len, texts)
        return CandidateTree.of(self.tree, drafted)

    def _mask(self, logits: Tensor, sampling: BatchSamplingParams, level: "Level", tokens: list[Tensor]) -> Tensor:
        """Logits ``[B N, K]`` of the nodes of a level without tokens that grammars forbid.

        A node that allows no token of the draft keeps its logits: its candidates will be rejected.
        """
        batch = len(logits) // len(level.paths)
        drafted = torch.cat(tokens, dim=1).tolist() if tokens else [[]] * batch
        paths = [[tree[node] for node in nodes] for tree in drafted for nodes in level.paths]
        masked = mask_tokens(logits, sampling.matchers, paths, self._vocabulary)
        possible = masked.amax(-1, keepdim=True) > -torch.inf
        return masked if bool(possible.all()) else torch.where(possible, masked, logits)

    def _draft_levels(
        self,
        shape: TreeShape,
        scheme: Scheme,
        sampling: BatchSamplingParams,
        random: Randomness,
        pending: "PendingTokens",
        *states: Tensor,
    ) -> tuple[Tensor, ...]:
        """The tensors of the tree. A captured function: see `GraphCache`."""
        batch, levels = len(pending.tokens), levels_of(shape, self._device)
        mixed = MixedShape(shape, pending.chains.shape[1]) if pending.chains.shape[1] else None
        # A captured graph has all levels.
        stops_early = bool(self.min_confidence) and mixed is None and self._device.type == "cpu"
        confidence = torch.ones(batch, 1, device=self._device)  # of the paths to the nodes of the last level
        weights: list[Tensor] = []
        supports: list[Tensor] = []
        # Nodes are numbered by depth: concatenating the levels gives the tree.
        tokens: list[Tensor] = []
        choices: list[Tensor] = []
        valid: list[Tensor] = []
        first_weights: list[Tensor] = []
        for depth, level in enumerate(levels):
            inner = len(level.columns)
            # This depends on q and on what has been drawn, so it does not bias what is drawn next.
            if depth and stops_early and float(confidence.max()) < self.min_confidence:
                shape = _cut(shape, depth)
                break
            if level.layout is None:
                logits = self._root_logits(pending, *states)
            else:
                logits = self._level_logits(tokens[-1].index_select(1, level.index_in_depth), level)
            if logits.shape[-1] > self._vocab_size:
                logits = logits[..., : self._vocab_size]
            flat = logits.reshape(batch * inner, -1)
            # At temperature 0 nothing is drawn: only as many tokens as candidates are needed.
            width = max(level.child_counts) + (mixed is not None) if sampling.all_greedy else SUPPORT
            each = sampling.repeat_interleave(inner)
            if sampling.any_grammars:
                flat = self._mask(flat, each, level, tokens)
            q = sparse_probabilities(flat, each, width)
            level_weights, support = (part.view(batch, inner, -1) for part in (q.weights, q.support))
            # If the draft gives no distribution, all weights are NaN.
            first_weights.append(level_weights[..., 0])
            level_weights = level_weights.nan_to_num(1.0 / level_weights.shape[-1])
            if self._vocabulary is not None:
                support = self._vocabulary[support]
            if mixed and level.layout is None:
                level_weights = _without(level_weights, support, pending.chains[:, 0])
            drawn = scheme.draw(level_weights, level.child_counts, sampling, random)
            drawn = drawn[:, level.child_parent, level.child_rank]
            choice = drawn.clamp(min=0)
            is_valid = drawn >= 0
            if valid:
                parents = level.index_in_depth.index_select(0, level.child_parent)
                is_valid &= valid[-1].index_select(1, parents)
            if stops_early:
                above = confidence if level.layout is None else confidence.index_select(1, level.index_in_depth)
                chances = _chances(flat, support, level_weights, sampling).index_select(1, level.child_parent)
                chances = chances.gather(2, choice[..., None])[..., 0]
                confidence = above.index_select(1, level.child_parent) * chances * is_valid
            weights.append(level_weights)
            supports.append(support)
            tokens.append(support.index_select(1, level.child_parent).gather(2, choice[..., None])[..., 0])
            choices.append(choice)
            valid.append(is_valid)
        nodes = [torch.cat(parts, dim=1) for parts in (tokens, valid, choices)]
        if mixed:
            nodes = _with_chain(mixed, pending.chains, nodes)
        failed = torch.cat(first_weights, dim=1).isnan().any(-1)
        q_by_column = None
        if not sampling.all_greedy:
            q_by_column = _by_column(mixed or shape, torch.cat(supports, dim=1), torch.cat(weights, dim=1))
        return CandidateTree(shape, nodes[0], nodes[1], nodes[2], q_by_column, failed).tensors


def _chances(logits: Tensor, support: Tensor, weights: Tensor, sampling: BatchSamplingParams) -> Tensor:
    """The draft's probabilities of the tokens ``support [B, N, S]``. At temperature 0 those of ``logits [B N, K]``."""
    if not sampling.all_greedy:
        return weights
    best = logits.float().topk(support.shape[-1]).values
    return (best - logits.float().logsumexp(-1, keepdim=True)).exp().view(support.shape)


@cache
def _cut(shape: TreeShape, depth: int) -> TreeShape:
    return shape.to_depth(depth)


def _with_chain(mixed: MixedShape, chains: Tensor, drawn: list[Tensor]) -> list[Tensor]:
    """Tokens, validity and choices of a mixed tree from those of its chains ``[B, c]`` and its ``drawn`` nodes."""
    looked_up = chains.clamp(min=0), chains >= 0, torch.zeros_like(chains)
    order = order_of(mixed, chains.device)
    return [torch.cat(both, dim=1).index_select(1, order) for both in zip(looked_up, drawn, strict=True)]


def _without(weights: Tensor, support: Tensor, tokens: Tensor) -> Tensor:
    """``weights [B, 1, S]`` without the probability of ``tokens [B]``, renormalised; as they are if nothing else is."""
    rest = weights * (support != tokens[:, None, None])
    mass = rest.sum(-1, keepdim=True)
    return torch.where(mass > 0, rest / mass, weights)


def _by_column(tree: TreeShape | MixedShape, support: Tensor, weights: Tensor) -> SparseDistributions:
    """``[B, 1 + n, S]`` from ``[B, N, S]`` at the inner nodes that draw. Others have weights 0 and distinct tokens."""
    count = 1 + len(tree.shape if isinstance(tree, MixedShape) else tree)
    leaves = torch.arange(weights.shape[-1], device=weights.device).expand(len(weights), count, -1)
    columns = inner_columns(tree, weights.device)
    return SparseDistributions(
        leaves.index_copy(1, columns, support), weights.new_zeros(leaves.shape).index_copy(1, columns, weights)
    )


@dataclass(frozen=True)
class PendingTokens:
    """Each sequence's tokens that its draft has not read; the last one is the root.

    Attributes:
        tokens: int64 ``[B, longest]``, padded with 0; on a GPU to a multiple of `_PADDED_TO`.
        counts: int64 ``[B]``.
        host_counts: the same numbers on the host.
        chains: int64 ``[B, c]``: see `LevelDrafter.chains`.
    """

    tokens: Tensor
    counts: Tensor
    host_counts: list[int]
    chains: Tensor

    @classmethod
    def of(
        cls, token_ids: list[list[int]], lengths: list[int], device: torch.device, chains: list[list[int]]
    ) -> "PendingTokens":
        """The tokens after each sequence's first ``lengths``, in one copy to the device."""
        pending = [tokens[length:] for tokens, length in zip(token_ids, lengths, strict=False)]
        counts = [len(tokens) for tokens in pending]
        # Padding costs a GPU nothing, and forwards of equal shapes share a graph.
        longest = max(counts) if device.type == "cpu" else -(-max(counts) // _PADDED_TO) * _PADDED_TO
        padded = [
            [*tokens, *[0] * (longest - len(tokens)), *chain, len(tokens)]
            for tokens, chain in zip(pending, chains or [[]] * len(pending), strict=True)
        ]
        table = torch.tensor(padded, device=device)
        return cls(table[:, :longest], table[:, -1], counts, table[:, longest:-1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors."""
        return (self.tokens, self.counts, self.chains) if self.chains.shape[1] else (self.tokens, self.counts)

    def with_tensors(self, tensors: Sequence[Tensor]) -> "PendingTokens":
        """A copy with other `tensors`."""
        tokens, counts, *chains = tensors
        return PendingTokens(tokens, counts, self.host_counts, chains[0] if chains else self.chains)

    def last(self, outputs: Tensor) -> Tensor:
        """``[B, 1, ...]`` from ``outputs [B, longest, ...]``: those at each sequence's last token."""
        if len(outputs) == 1 and outputs.device.type == "cpu":
            return outputs[:, -1:]
        return outputs[torch.arange(len(outputs), device=outputs.device), self.counts - 1][:, None]

    def commit(self, cache: Cache) -> None:
        """Commit them all, after a forward that has read them."""
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        cache.commit(columns.expand(len(self.tokens), -1), self.counts, host_counts=self.host_counts)


@dataclass(frozen=True)
class Level:
    """The inner nodes of one depth of a tree, which one forward of the draft reads.

    Attributes:
        columns: int64 ``[N]``, the inner nodes (root 0, node i is 1 + i).
        index_in_depth: int64 ``[N]``, index of each among all nodes of its depth. Empty for the root.
        parent_index: int64 ``[N]``, index of each one's parent among the inner nodes of the level before. Empty for the
            root.
        child_counts: the number of children of each.
        child_parent: int64 ``[K]``, for each child, which are the nodes of the next depth: index of its parent in
            ``columns``; child_rank: int64 ``[K]``, its index among its siblings.
        layout: offsets and mask of these nodes after those of earlier levels; None for the root, which is committed.
        paths: the nodes from the root to each of the N nodes.
    """

    columns: Tensor
    index_in_depth: Tensor
    parent_index: Tensor
    child_counts: tuple[int, ...]
    child_parent: Tensor
    child_rank: Tensor
    layout: TokenLayout | None
    paths: list[list[int]]


@cache
def inner_columns(tree: TreeShape | MixedShape, device: torch.device) -> Tensor:
    """int64 ``[N]``: the columns of all `levels_of` a tree of drawn candidates, which may be part of a mixed one."""
    if isinstance(tree, MixedShape):
        columns = torch.tensor([0, *(1 + tree.drawn_nodes.index(node) for node in range(len(tree.drawn)))])
        return columns.to(device)[inner_columns(tree.drawn, device)]
    return torch.cat([level.columns for level in levels_of(tree, device)])


@cache
def levels_of(shape: TreeShape, device: torch.device) -> tuple[Level, ...]:
    """The levels of a tree."""
    levels = []
    read: list[int] = []
    for depth, nodes in enumerate(shape.levels):
        columns = torch.tensor(nodes) + 1
        index_in_depth: list[int] = []
        parent_index: list[int] = []
        layout = None
        if depth > 0:
            index_in_depth = [node - shape.depths.index(depth) for node in nodes]
            parent_index = [shape.levels[depth - 1].index(shape.parents[node]) for node in nodes]
            read += columns.tolist()
            layout = TokenLayout(shape.offsets[read] - 1, shape.mask[columns][:, read]).to(device)
        is_child = shape.children[columns] >= 0
        child_parent, child_rank = (part.to(device) for part in is_child.nonzero(as_tuple=True))
        indices = torch.tensor([index_in_depth, parent_index], dtype=torch.int64, device=device)
        counts = tuple(is_child.sum(-1).tolist())
        nodes_to = [[node for node in path if node >= 0] for path in shape.paths[columns].tolist()]
        levels.append(
            Level(columns.to(device), indices[0], indices[1], counts, child_parent, child_rank, layout, nodes_to)
        )
    return tuple(levels)
