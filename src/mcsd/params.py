"""The parameters and the results of a request: frozen dataclasses, validated once. Free of torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import partial, wraps
from typing import Any, Literal, TypeVar

from mcsd.errors import InvalidParameter, check_int, check_number

FinishReason = Literal["stop", "length"]

_ALIASES = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "n_predict", "num_predict"), "max_new_tokens"),
    **dict.fromkeys(("stop_strings", "stop_sequences", "stop_words"), "stop"),
    **dict.fromkeys(("repeat_penalty", "repetition"), "repetition_penalty"),
    **dict.fromkeys(("random_seed", "manual_seed"), "seed"),
    **dict.fromkeys(("topk", "top_n"), "top_k"),
    **dict.fromkeys(("topp", "nucleus"), "top_p"),
    **dict.fromkeys(("temp", "do_sample", "greedy"), "temperature (0 is greedy)"),
    **dict.fromkeys(("top_logprobs", "num_logprobs", "output_scores"), "logprobs"),
    "max_length": "max_new_tokens, which does not count the prompt",
    "generation_config": "it as the second argument: generate(prompt, config)",
}
"""Names that other libraries give to these parameters."""

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024


_Class = TypeVar("_Class", bound=type)


def _names_checked(cls: _Class) -> _Class:
    """Make unknown keyword arguments of a dataclass a named error, and remember which fields were given."""
    init = cls.__init__  # type: ignore[misc]

    @wraps(init)
    def checked(self: Any, *args: Any, **values: Any) -> None:
        values.pop("_given", None)  # As in SamplingParams(**vars(params)).
        check_names(values)
        init(self, *args, **values)
        given = [one.name for one in fields(cls)][: len(args)]
        object.__setattr__(self, "_given", frozenset((*given, *values)))

    cls.__init__ = checked  # type: ignore[misc]
    return cls


@_names_checked
@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request. The defaults sample from the model's own distribution.

    Applied in this order: penalties, bias, temperature, top-k, top-p, min-p (the last four as transformers does).

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of most probable tokens with at least this total probability, in (0, 1].
        min_p: drop tokens with less than this fraction of the highest probability, in [0, 1].
        max_new_tokens: at most this many new tokens.
        seed: makes the text reproducible, whatever else is in the batch; None draws a random one.
        stop: strings that end the text; they are not part of it.
        repetition_penalty: > 1 discourages tokens of the prompt and the text (Keskar et al. 2019).
        presence_penalty: subtracted once from the logit of each token in the text so far.
        frequency_penalty: subtracted from a token's logit for each occurrence in the text so far.
        logit_bias: added to the logits of these token ids.
        logprobs: None, or the number of most probable alternatives to report with each token's log-probability.
        ignore_eos: go on after an end-of-sequence token.

    Raises:
        InvalidParameter: an unknown name; a value outside its range, NaN or infinite.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 128
    seed: int | None = None
    stop: Sequence[str] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        number, integer = partial(check_number, error=InvalidParameter), partial(check_int, error=InvalidParameter)
        number("temperature", self.temperature, 0, 1e4)
        integer("top_k", self.top_k, 0, 2**31)
        number("top_p", self.top_p, 0, 1, low_open=True)
        number("min_p", self.min_p, 0, 1)
        integer("max_new_tokens", self.max_new_tokens, 1, 2**31)
        if self.seed is not None:
            integer("seed", self.seed, 0, 2**64 - 1)
        number("repetition_penalty", self.repetition_penalty, 0, 100, low_open=True)
        number("presence_penalty", self.presence_penalty, -100, 100)
        number("frequency_penalty", self.frequency_penalty, -100, 100)
        if self.logprobs is not None:
            integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidParameter(f"logit_bias={self.logit_bias!r:.80} is not a mapping", "give {token id: bias}")
        # A copy: the checked values must not change afterwards.
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        for token, bias in self.logit_bias.items():
            integer("logit_bias token", token, 0, 2**31)
            number("logit_bias", bias, -1e4, 1e4)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidParameter(f"ignore_eos={self.ignore_eos!r:.40} is not a bool", "give True or False")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        strings = isinstance(self.stop, Sequence) and len(self.stop) <= MAX_STOP_STRINGS
        if strings and all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in self.stop):
            object.__setattr__(self, "stop", tuple(self.stop))
        else:
            raise InvalidParameter(
                f"stop={self.stop!r:.80}: not at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters",
                "give one string or a short list of strings",
            )

    @property
    def given(self) -> frozenset[str]:
        """The fields that were named when the object was made."""
        return frozenset(vars(self)["_given"])

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or a bias change the logits, which then depend on the text so far."""
        return bool(self.logit_bias) or (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (
            1.0,
            0.0,
            0.0,
        )


def check_names(names: Iterable[str]) -> None:
    """Check that all names are sampling parameters.

    Raises:
        InvalidParameter: one is not; the hint gives the right name.
    """
    known = [one.name for one in fields(SamplingParams)]
    for name in names:
        if not isinstance(name, str):
            raise InvalidParameter(f"{name!r:.40} is not a sampling parameter", f"one of {', '.join(known)}")
        if name not in known:
            close = get_close_matches(name, known, n=1)
            right = _ALIASES.get(name) or (close[0] if close else None)
            hint = f"use {right}" if right else f"one of {', '.join(known)}"
            raise InvalidParameter(f"{name!r:.40} is not a sampling parameter", hint)


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
    """

    prompt_tokens: int
    new_tokens: int
    target_calls: int
    draft_tokens: int
    accepted_tokens: int
    acceptance_histogram: tuple[int, ...]
    seconds: Mapping[str, float]

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
        finish_reason: "stop" (end of sequence or a stop string) or "length".
        logprobs: one entry per token if requested, else None.
        stats: cost and acceptance.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None
    stats: Stats

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else f"{self.text[:57]}..."
        return (
            f"Completion({text!r}, {len(self.token_ids)} tokens, {self.finish_reason!r},"
            f" {self.stats.tokens_per_second:.1f} tokens/s, {self.stats.mean_acceptance_length:.2f} tokens per step)"
        )


@dataclass(frozen=True)
class Chunk:
    """The output of one step of a streamed request.

    Attributes:
        text: the text that became final (a possible beginning of a stop string is held back).
        token_ids: the tokens emitted in this step.
        accepted: how many of them were drafted; these come first, the rest comes from the target.
        pieces: ``text`` split by token, one entry per token.
        completion: the whole result, on the last chunk only.
    """

    text: str
    token_ids: tuple[int, ...]
    accepted: int
    pieces: tuple[str, ...]
    completion: Completion | None = None
