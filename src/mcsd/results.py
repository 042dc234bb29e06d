"""The results of a request: frozen dataclasses. Free of torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mcsd.step_trace import StepTrace

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of one emitted token under the model itself (before temperature and truncation).

    Attributes:
        token_id: the emitted token.
        logprob: its natural log-probability.
        top: the most probable tokens and their log-probabilities, in descending order.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Stats:
    """Cost and acceptance statistics of one request.

    Attributes:
        prompt_tokens: length of the prompt.
        new_tokens: tokens emitted, the end-of-sequence token included.
        target_calls: forwards of the target that verified this request (prefill not counted).
        draft_tokens: candidates verified.
        accepted_tokens: candidates accepted and emitted.
        acceptance_histogram: entry i counts the target calls that emitted i candidates.
        seconds: wall time while the request ran, by part: prefill, draft, target, judge, other.
        cached_tokens: tokens of the prompt that were copied from another text and not read.
    """

    prompt_tokens: int
    new_tokens: int
    target_calls: int
    draft_tokens: int
    accepted_tokens: int
    acceptance_histogram: tuple[int, ...]
    seconds: Mapping[str, float]
    cached_tokens: int = 0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per target call, the target's own (bonus) token included."""
        return self.new_tokens / self.target_calls if self.target_calls else 0.0

    @property
    def draft_acceptance_rate(self) -> float:
        """Share of the verified candidates that were emitted."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of wall time, prefill included."""
        total = sum(self.seconds.values())
        return self.new_tokens / total if total else 0.0


@dataclass(frozen=True)
class Completion:
    """The result of one request.

    Attributes:
        text: the new text; empty when the engine has no tokenizer.
        token_ids: the new tokens.
        finish_reason: "stop" (end of sequence, a stop string or token, or a stopping criterion) or "length".
        logprobs: one entry per token if requested, else None.
        stats: cost and acceptance.
        prompt_logprobs: one entry per token of the prompt if requested, else None. The first token has none.
        pieces: ``text`` split by token, one entry per token.
        drafted: whether each token was a candidate that was accepted.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None
    stats: Stats
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    pieces: tuple[str, ...] = ()
    drafted: tuple[bool, ...] = ()

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else f"{self.text[:57]}..."
        return f"Completion({text!r}, {self._summary})"

    @property
    def _summary(self) -> str:
        return (
            f"{len(self.token_ids)} tokens, {self.finish_reason!r}, {self.stats.tokens_per_second:.1f} tokens/s,"
            f" {self.stats.mean_acceptance_length:.2f} tokens per step"
        )

    def _repr_html_(self) -> str:
        from mcsd.notebook import text_html

        pieces = self.pieces if self.text else [f"{token} " for token in self.token_ids]
        return text_html(pieces, self.drafted, self._summary)


@dataclass(frozen=True)
class Chunk:
    """The output of one step of a streamed request.

    Attributes:
        text: the text that became final (a possible beginning of a stop string is held back).
        token_ids: the tokens emitted in this step.
        accepted: how many of them were drafted; these come first, the rest comes from the target.
        pieces: ``text`` split by token, one entry per token.
        completion: the whole result, on the last chunk only.
        trace: the candidates of the step, if ``trace=True`` was given.
        logprobs: one entry per token if requested, else None.
    """

    text: str
    token_ids: tuple[int, ...]
    accepted: int
    pieces: tuple[str, ...]
    completion: Completion | None = None
    trace: StepTrace | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None

    def joined(self, later: "Chunk") -> "Chunk":
        """This chunk and a later one in one; ``accepted`` is the sum of theirs, and there is no trace."""
        return Chunk(
            self.text + later.text,
            self.token_ids + later.token_ids,
            self.accepted + later.accepted,
            self.pieces + later.pieces,
            later.completion,
            logprobs=None if self.logprobs is None else self.logprobs + (later.logprobs or ()),
        )
