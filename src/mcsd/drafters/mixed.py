"""Look-up beside a draft model or head: its candidates and a looked-up chain in one tree."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mcsd.drafters.base import Drafter
from mcsd.drafters.corpus import Corpus, look_up_in
from mcsd.drafters.depths import DEPTHS, StepCost, best_depths, default_cost, expected_tokens
from mcsd.drafters.level import LevelDrafter
from mcsd.drafters.look_up import LookUp
from mcsd.rng import Randomness
from mcsd.sampling import BatchSamplingParams
from mcsd.schemes import CandidateTree, Scheme
from mcsd.schemes.mixed_shape import MixedShape
from mcsd.tree import PLAIN, TreeShape

MAX_CHAIN = DEPTHS[-1]
"""Tokens of the longest chain."""

_DRAWN = 2.0
"""Tokens that a step with drawn candidates alone is taken to emit, when the length of the chain is chosen."""


class MixedDrafter(Drafter):
    """Drafts with a model or head, and looks tokens up (see `LookUp`).

    The looked-up chain hangs at the root. If it alone is expected to give more tokens than the deepest drawn path, the
    draft is not run.

    Args:
        drawn: drafts with the model or head.
        always: look up for every sequence; otherwise only for those that have a prediction.
        running: sequences that ``drawn`` has already.
        corpus: token ids of texts in which tokens are looked up too.

    Attributes:
        cost: of a step; see `StepCost`.
    """

    def __init__(
        self, drawn: LevelDrafter, always: bool, running: int = 0, corpus: Iterable[Sequence[int]] = ()
    ) -> None:
        self.name = f"{drawn.name}+ngram" if always else drawn.name
        self.hidden_layers = drawn.hidden_layers
        self.drawn = drawn
        self.cost: StepCost = default_cost
        self._always = always
        self._corpus = Corpus(corpus)
        self._sequences: list[LookUp | None] = [None] * running

    @property
    def sequences(self) -> int:
        """See `Drafter.sequences`."""
        return max(self.drawn.sequences, len(self._sequences))

    def add(self, prompt: list[int], hidden: Tensor | None) -> None:
        """See `Drafter.add`."""
        self.drawn.add(prompt, hidden)
        self._sequences.append(look_up_in(self._corpus, prompt) if self._always else None)

    def expect(self, prompt: list[int], prediction: Sequence[int]) -> None:
        """See `Drafter.expect`."""
        self._sequences[-1] = look_up_in(self._corpus, prompt, prediction)

    def most_reused(self, prompt: list[int]) -> int:
        """See `Drafter.most_reused`."""
        return self.drawn.most_reused(prompt)

    def keep(self, sequence: int, token_ids: list[int]) -> None:
        """See `Drafter.keep`."""
        self.drawn.keep(sequence, token_ids)

    def unread(self, token_ids: list[list[int]]) -> list[int]:
        """See `Drafter.unread`."""
        return self.drawn.unread(token_ids)

    def skip(self, token_ids: list[list[int]], most: Sequence[int]) -> None:
        """See `Drafter.skip`."""
        self.drawn.skip(token_ids, most)

    def catch_up(self, token_ids: list[list[int]]) -> None:
        """See `Drafter.catch_up`."""
        self.drawn.catch_up(token_ids)

    def draft(
        self,
        token_ids: list[list[int]],
        shape: TreeShape,
        scheme: Scheme,
        sampling: BatchSamplingParams,
        random: Randomness,
    ) -> CandidateTree:
        """See `Drafter.draft`."""
        looking = [sequence for sequence in self._sequences if sequence] if len(shape) else []
        for text, sequence in zip(token_ids, self._sequences if looking else (), strict=bool(looking)):
            if sequence:
                sequence.update(text)
        takes = [one.speculative for one in sampling.params]
        both = zip(self._sequences, takes, strict=True)
        rates = [sequence.best(MAX_CHAIN)[1] if sequence and speculative else [] for sequence, speculative in both]
        # Where verification reads q, the text of a seed depends on the tree, which must not depend on other sequences.
        pinned = scheme.needs_q and sampling.any_seeded
        fewest = min((sum(each) for each, speculative in zip(rates, takes, strict=True) if speculative), default=0)
        alone = bool(looking) and not pinned and fewest > shape.depth
        drawn, otherwise = (0, 1.0) if alone else (len(shape), _DRAWN)
        nodes = {depth: drawn + depth for depth in (0, *DEPTHS)}
        tokens = [expected_tokens(each, otherwise) for each in rates]
        depths = best_depths(tokens, nodes, self.cost, pinned) if looking else [0] * len(rates)
        longest = max(depths, default=0)
        chains = [
            sequence.continuations(text, depth, 1)[0] if sequence and depth else []
            for sequence, text, depth in zip(self._sequences, token_ids, depths, strict=True)
        ]
        padded = [chain + [-1] * (longest - len(chain)) for chain in chains]
        if alone and longest:
            return self._looked_up(padded, sampling.greedy.device)
        self.drawn.chains = padded if longest else []
        self.drawn.min_confidence = self.min_confidence
        return self.drawn.draft(token_ids, shape, scheme, sampling, random)

    def _looked_up(self, chains: list[list[int]], device: torch.device) -> CandidateTree:
        """A tree without drawn candidates."""
        self.drawn.tree = mixed = MixedShape(PLAIN, len(chains[0]))
        tokens = torch.tensor(chains, device=device)
        failed = torch.zeros(len(chains), dtype=torch.bool, device=device)
        return CandidateTree.of(mixed, (tokens.clamp(min=0), tokens >= 0, torch.zeros_like(tokens), failed))

    def commit(self, path: Tensor, paths: list[list[int]], hidden: Tensor | None) -> None:
        """See `Drafter.commit`."""
        self.drawn.commit(path, paths, hidden)

    def remove(self, sequence: int) -> None:
        """See `Drafter.remove`."""
        self.drawn.remove(sequence)
        self._sequences[sequence] = self._sequences[-1]
        self._sequences.pop()

    def clear(self) -> None:
        """See `Drafter.clear`."""
        self.drawn.clear()
        self._sequences.clear()


def with_look_up(drafter: Drafter, running: int) -> Drafter:
    """A drafter that takes predictions; one of another kind than the package's own is returned as it is.

    Args:
        drafter: of an engine.
        running: sequences that it has already.
    """
    return MixedDrafter(drafter, False, running) if isinstance(drafter, LevelDrafter) else drafter
