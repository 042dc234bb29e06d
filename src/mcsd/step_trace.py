"""What one step drafted and accepted, for pages that draw it. Free of torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepTrace:
    """The candidate tree of one step, and what verification made of it.

    Candidates are numbered from 0 in order of depth. Entry 0 of ``top`` belongs to the root, the last token before the
    step; entry 1 + i to candidate i.

    Attributes:
        parents: of each candidate, -1 for the root.
        token_ids: of each candidate; None where the drafter had none. Such a node is never verified.
        pieces: the text that each candidate adds after its parent; empty without a tokenizer.
        q: the probability of each candidate after its parent under the draft, as it was drawn; None if it was not drawn
            from a distribution (n-grams, temperature 0).
        p: the same under the target: the distribution that verification uses, with penalties, temperature and
            truncation. None where it is none (NaN).
        top: the target's most probable tokens and their probabilities after the root and after each candidate.
        path: the accepted candidates, from the root on.
        token_id: the token that the target added after the path; None if it gave no distribution there. The chunk has
            fewer tokens if the text ended before.
    """

    parents: tuple[int, ...]
    token_ids: tuple[int | None, ...]
    pieces: tuple[str, ...]
    q: tuple[float | None, ...]
    p: tuple[float | None, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]
    path: tuple[int, ...]
    token_id: int | None
