"""The results of `mcsd verify`: frozen dataclasses, free of torch. Field names are those of ``--json``."""

from dataclasses import dataclass

LEVEL = 1e-3
"""The probability that a correct engine fails the sampled part, over all contexts together."""


@dataclass(frozen=True)
class Divergence:
    """A token of a greedy text that is not the argmax of the target's reference logits.

    Attributes:
        prompt: index of the prompt, from 0; position: of the token in the new text, from 0.
        token: the engine's; best: the argmax.
        gap: logit of the argmax minus logit of the token.
    """

    prompt: int
    position: int
    token: int
    best: int
    gap: float


@dataclass(frozen=True)
class GreedyReport:
    """The check of the texts at temperature 0, with every token teacher-forced.

    Attributes:
        texts, tokens: number checked; asked: number of texts requested.
        divergences: in the order of texts.
        rounding: the largest change, with the shape of the forward, of the gap between a position's two largest
            logits. A divergence with a gap up to this is a tie.
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
        """Whether there are no failures."""
        return not self.failures


@dataclass(frozen=True)
class ContextReport:
    """Samples of the engine's next two tokens after one context, tested against the target's exact distribution.

    Attributes:
        prompt: index of the prompt, from 0; continued: tokens of its greedy text that follow it; tokens: length of the
            whole context.
        samples: number of sampled pairs.
        cells: cells of the chi-square test: single pairs, or pools of rare ones.
        chi_square: the statistic, with ``cells - 1`` degrees of freedom.
        forbidden: samples with probability 0.
        p_value: of the statistic and the forbidden samples together. It allows at each context for the largest
            rounding measured at any.
        total_variation: distance of the samples from the distribution, over the cells.
        plain: the same distance for simulated samples of the exact distribution: 2.5 % quantile, mean, 97.5 % quantile.
        rounding, distance: the largest change of the distribution when it was computed in other shapes, in total
            variation and as Σ(p'-p)²/p over the cells.
        sees: the total variation that is detected with probability 0.9; None if there is only one cell.
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
class SampledReport:
    """The check of the samples, over all contexts.

    Attributes:
        contexts: those that were sampled.
        asked: number of contexts requested; asked_samples: per context.
        p_value: of the sum of all statistics; sees: as in `ContextReport`, for a bias common to all contexts.
        rejected: by Holm's correction at `LEVEL`: each context, then all together.
    """

    contexts: tuple[ContextReport, ...]
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
class VerificationReport:
    """The whole result.

    Attributes:
        target, draft, tree, scheme: of the engine; dtype: of the target's logits.
        greedy, sampled: the two parts.
        seconds: wall time.
    """

    target: str
    draft: str
    tree: str
    scheme: str
    dtype: str
    greedy: GreedyReport
    sampled: SampledReport
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether both parts passed."""
        return self.greedy.passed and self.sampled.passed
