"""What `mcsd verify` found: frozen records, free of torch."""

from dataclasses import dataclass

LEVEL = 1e-3
"""The odds that a lossless engine fails the sampled part, all contexts together."""


@dataclass(frozen=True)
class Divergence:
    """A token of a greedy text that is not the argmax of the target's plain forward over the text before it.

    Attributes:
        prompt: which, from 0; position: of the token in the new text, from 0.
        token: what the engine said; best: the argmax.
        gap: the argmax's logit minus the token's.
    """

    prompt: int
    position: int
    token: int
    best: int
    gap: float


@dataclass(frozen=True)
class Greedy:
    """The texts at temperature 0, every token of them teacher-forced.

    Attributes:
        texts, tokens: that were checked; asked: texts that were wanted.
        divergences: in the order of texts.
        rounding: the most that the gap between a position's two likeliest tokens moved with the shape of the forward.
            A divergence of a gap up to this is a tie.
    """

    texts: int
    tokens: int
    asked: int
    divergences: tuple[Divergence, ...]
    rounding: float

    @property
    def failures(self) -> tuple[Divergence, ...]:
        """The divergences that rounding does not explain."""
        return tuple(one for one in self.divergences if not one.gap <= self.rounding)

    @property
    def passed(self) -> bool:
        """Whether there are none."""
        return not self.failures


@dataclass(frozen=True)
class Context:
    """One context: the engine's next two tokens, many times, against the law of the target.

    Attributes:
        prompt: which, from 0; continued: tokens of its greedy text that follow it; tokens: of the whole context.
        samples: pairs that were drawn.
        cells: pairs, or lumps of pairs, that were told apart.
        chi_square: the statistic, of ``cells - 1`` degrees.
        forbidden: samples that the law gives no chance.
        p_value: of the statistic and the forbidden samples together, where rounding may do at each context what it
            was seen to do at any.
        total_variation: of the samples from the law, over the cells.
        plain: what as many samples from the law itself show: the 2.5 % quantile, the mean, the 97.5 % quantile.
        rounding, distance: the most that the law moved, in total variation and as Σ(p'-p)²/p over the cells, when it
            was computed in other shapes.
        sees: the total variation that would be found nine times out of ten; None if there is one cell.
    """

    prompt: int
    continued: int
    tokens: int
    samples: int
    cells: int
    chi_square: float
    forbidden: int
    p_value: float
    total_variation: float
    plain: tuple[float, float, float]
    rounding: float
    distance: float
    sees: float | None


@dataclass(frozen=True)
class Sampled:
    """All contexts.

    Attributes:
        contexts: one by one, those that were sampled.
        asked: contexts that were wanted; asked_samples: of each.
        p_value: of all contexts' statistics together; sees: as in `Context`, of a bias that all share.
        rejected: which of the contexts, and last all together, Holm's correction rejects at `LEVEL`.
    """

    contexts: tuple[Context, ...]
    asked: int
    asked_samples: int
    p_value: float
    sees: float | None
    rejected: tuple[bool, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is rejected."""
        return not any(self.rejected)


@dataclass(frozen=True)
class Report:
    """All that was found.

    Attributes:
        target, draft, tree, scheme: of the engine; dtype: of the target's logits.
        greedy, sampled: the two parts.
        seconds: that it took.
    """

    target: str
    draft: str
    tree: str
    scheme: str
    dtype: str
    greedy: Greedy
    sampled: Sampled
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether both parts passed."""
        return self.greedy.passed and self.sampled.passed
