"""What a drafter is: whatever proposes candidates. Knows the scheme's draw, never its judgement."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from mcsd.rng import Randomness
from mcsd.sampling import Settings
from mcsd.schemes import CandidateTree, Scheme
from mcsd.tree import TreeShape


class Drafter(ABC):
    """Proposes a tree of candidates for each row. Rows are numbered as in `mcsd.models.Cache`.

    The target's hidden states are handed over for committed tokens: of all but the prompt's last token at `add`, and
    of the root and the accepted path at `commit`. So a drafter has them for every token but the newest.
    """

    name: str
    hidden: tuple[int, ...] = ()
    """The layers of the target whose hidden states are handed over, numbered as in `mcsd.models.Output`."""
    weight_bytes: int = 0
    """What drafting a level reads of weights."""
    draws: ClassVar[bool] = True
    """Whether candidates are drawn from a q. If not, they are judged as scheme "top-k" judges."""

    @property
    def token_bytes(self) -> int:
        """What drafting a level reads of keys and values for each token of the text."""
        return 0

    @abstractmethod
    def add(self, prompt: list[int], hidden: Tensor | None) -> None:
        """A row begins. What it takes long to read is better read when the row is first drafted for: it may never be.

        Args:
            prompt: all of it.
            hidden: its states ``[1, len(prompt) - 1, F]``, if wanted and not empty.
        """

    def read(self, texts: list[list[int]]) -> None:  # noqa: B027 (not every drafter reads)
        """Read what it is behind by: prompts, and what plain steps have left unread. Before a draft that has nodes.

        Args:
            texts: as for `draft`.
        """

    @abstractmethod
    def draft(
        self, texts: list[list[int]], shape: TreeShape, scheme: Scheme, settings: Settings, random: Randomness
    ) -> CandidateTree:
        """Propose candidates after each text.

        Args:
            texts: all tokens of each row, prompt included; the last one is the root.
            shape: the tree wanted. A drafter that has nothing to say may return an empty tree.
            scheme: whose draw chooses.
            settings: of the rows.
            random: the drawing stream.
        """

    @abstractmethod
    def commit(self, path: Tensor, accepted: Tensor, hidden: Tensor | None) -> None:
        """The judgement on the last draft.

        Args:
            path: int64 ``[B, depth]``, accepted nodes, padded with -1; accepted: int64 ``[B]``, how many.
            hidden: ``[B, 1 + depth, F]``, of the root and the path, if wanted.
        """

    @abstractmethod
    def remove(self, row: int) -> None:
        """A row ends; the last one takes its number."""

    @abstractmethod
    def clear(self) -> None:
        """All rows end, whatever state an interrupted step has left them in."""
