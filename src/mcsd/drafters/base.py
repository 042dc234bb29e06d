"""The drafter interface: proposes candidates. Knows the scheme's draw, never its verification."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from mcsd.rng import Randomness
from mcsd.sampling import BatchSamplingParams
from mcsd.schemes import CandidateTree, Scheme
from mcsd.tree import TreeShape


class Drafter(ABC):
    """Proposes a tree of candidates for each sequence. Sequences are numbered as in `mcsd.models.Cache`.

    A drafter may ask for the target's hidden states. It gets those of the prompt tokens that the target reads, which
    are all but the last one unless it allows more in `most_reused`, at `add`; and those of the root and the accepted
    path at `commit`: of every committed token but the newest.
    """

    name: str
    hidden_layers: tuple[int, ...] = ()
    """The target's layers whose hidden states the drafter asks for, numbered as in `mcsd.models.ModelOutput`."""
    min_confidence: float = 0.0
    """Drafting stops when the draft gives every path of the tree a lower probability; 0: it never stops early. The
    engine sets it before a draft. A drafter may ignore it."""
    is_sampled: ClassVar[bool] = True
    """Whether candidates are drawn from a q. If not, they are verified as scheme "top-k" verifies."""

    @property
    def sequences(self) -> int:
        """How many sequences it has."""
        return 0

    @abstractmethod
    def add(self, prompt: list[int], hidden: Tensor | None) -> None:
        """Add a sequence. Its prompt is best read in `catch_up`: a sequence may end before it is drafted for.

        Args:
            prompt: all of its tokens.
            hidden: the target's hidden states ``[1, n, F]`` of the last n tokens before the last one, if asked for and
                not empty. The tokens before those, at most `most_reused`, are copied from an earlier text.
        """

    def most_reused(self, prompt: list[int]) -> int:
        """How many first tokens of a prompt the target may copy from an earlier text, without their hidden states."""
        return 0 if self.hidden_layers else len(prompt)

    def keep(self, sequence: int, token_ids: list[int]) -> None:  # noqa: B027 (not every drafter reads)
        """Keep what was read of a sequence for later ones that begin like it. Called for texts without a failure.

        Args:
            sequence: its index.
            token_ids: all of its tokens, prompt included. After the end of a text it may have read more.
        """

    def expect(self, prompt: list[int], prediction: Sequence[int]) -> None:  # noqa: B027 (not every drafter looks up)
        """Take the text that the newest sequence is expected to become, a source of candidates. Called after `add`.

        Args:
            prompt: all of its tokens.
            prediction: the tokens that are expected after them.
        """

    def unread(self, token_ids: list[list[int]]) -> list[int]:
        """How many tokens of each sequence `catch_up` has to read; 0 for one of which `skip` can leave nothing out.

        Args:
            token_ids: as for `draft`.
        """
        return [0] * len(token_ids)

    def skip(self, token_ids: list[list[int]], most: Sequence[int]) -> None:  # noqa: B027 (not every drafter can)
        """Before `catch_up`: leave out what it need not read. A draft after a part of a text has another q.

        Args:
            token_ids: as for `draft`.
            most: of a sequence with more `unread` tokens, so many of the last ones are read as a text of their own.
        """

    def catch_up(self, token_ids: list[list[int]]) -> None:  # noqa: B027 (not every drafter reads)
        """Read the tokens the drafter lags behind by: prompts, and those of steps without candidates.

        Called before a draft of a tree that has nodes.

        Args:
            token_ids: as for `draft`.
        """

    @abstractmethod
    def draft(
        self,
        token_ids: list[list[int]],
        shape: TreeShape,
        scheme: Scheme,
        sampling: BatchSamplingParams,
        random: Randomness,
    ) -> CandidateTree:
        """Propose candidates.

        Args:
            token_ids: all tokens of each sequence, prompt included; the last one is the root.
            shape: the tree to fill. A drafter without candidates may return an empty tree.
            scheme: draws the candidates.
            sampling: of the sequences.
            random: the `mcsd.rng.DRAW` stream.
        """

    @abstractmethod
    def commit(self, path: Tensor, paths: list[list[int]], hidden: Tensor | None) -> None:
        """Take the result of verifying the last draft.

        Args:
            path: int64 ``[B, depth]``, accepted nodes, padded with -1.
            paths: the same nodes on the host, without padding.
            hidden: the target's hidden states ``[B, 1 + depth, F]`` of the root and the path, if asked for.
        """

    @abstractmethod
    def remove(self, sequence: int) -> None:
        """Remove a sequence; the last one takes its index."""

    @abstractmethod
    def clear(self) -> None:
        """Remove all sequences, whatever state an interrupted step has left them in."""
