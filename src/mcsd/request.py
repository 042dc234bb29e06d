"""The state of one request: the tokens emitted, when the text ends, and its statistics."""

import hashlib
import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mcsd.detokenization import TextStream
from mcsd.errors import (
    GrammarFailed,
    McsdError,
    NonFiniteLogits,
    NoTokenLeft,
    ProcessorFailed,
    RequestError,
    StoppingCriterionFailed,
)
from mcsd.grammars import GrammarMatcher
from mcsd.params import SamplingParams
from mcsd.results import Chunk, Completion, FinishReason, Stats, TokenLogprobs
from mcsd.step_trace import StepTrace


class Request:
    """State of one request. The engine appends the accepted tokens of each step; the request decides where it ends.

    Args:
        prompt: token ids.
        params: how to sample.
        max_new_tokens: the most new tokens that fit into the context after the prompt.
        tokenizer: for text and stop strings; may be None.
        eos_token_ids: tokens that end the text.
        device: of the token ids that stopping criteria get.
        matcher: the state of the request's grammar, if it has one.

    Attributes:
        prompt_logprobs: one entry per token of the prompt, None for the first; None unless the request wants them.
    """

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        max_new_tokens: int,
        tokenizer: Any | None,
        eos_token_ids: frozenset[int],
        device: torch.device | str = "cpu",
        matcher: GrammarMatcher | None = None,
    ) -> None:
        self.prompt = prompt
        self.params = params
        self.matcher = matcher
        seed = secrets.randbits(64) if params.seed is None else params.seed
        self.seed = seed - (1 << 64) if seed >= 1 << 63 else seed
        """The seed's 64 bits as a signed number, as int64 holds them."""
        self.tokens: list[int] = []
        self.all_tokens = list(prompt)
        self.chunks: deque[Chunk] = deque()
        self.reused_tokens = 0
        """Tokens of the prompt that were not read, because another text begins with them."""
        self.completion: Completion | None = None
        self.error: McsdError | None = None
        self.trace = False
        """Whether the chunks carry traces."""
        self.alone = False
        """Whether it takes its next step alone, because one with others has failed."""
        self.clock: Mapping[str, float] = {}
        """The engine's timers when the request was admitted."""
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None if params.prompt_logprobs is None else [None]
        self._options = max_new_tokens, tokenizer, eos_token_ids, device
        self._max_new_tokens = min(params.max_new_tokens, max_new_tokens)
        self._stream = TextStream(tokenizer, params, prompt)
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
        self._device = device
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._histogram: list[int] = []
        self._drafted = 0
        self._from_draft: list[bool] = []
        self._ended = False

    @property
    def has_chunk(self) -> bool:
        """Whether the first of `chunks` may be taken. The last one may once the completion is on it."""
        return len(self.chunks) > 1 or (len(self.chunks) == 1 and (self.done or not self._ended))

    @property
    def started(self) -> bool:
        """Whether the request has had a place in the batch."""
        return bool(self.clock)

    @property
    def done(self) -> bool:
        """Whether the text has ended or the request has failed."""
        return self.completion is not None or self.error is not None

    @property
    def remaining(self) -> int:
        """New tokens that may still follow."""
        return self._max_new_tokens - len(self.tokens)

    def failure(self, model: str, is_draft: bool, is_finite: bool) -> RequestError:
        """Why there is no distribution to go on with.

        Args:
            model: the name of the model that gave none.
            is_draft: whether it drafts.
            is_finite: whether the logits of the target are usable, before the parameters of the request.
        """
        for processor in self.params.logits_processors:
            if (error := getattr(processor, "error", None)) is not None:
                failed = ProcessorFailed(f"a logits processor raised {error!r:.200}", "mend it, or leave it out")
                failed.__cause__ = error
                return failed
        if self.matcher is not None and self.matcher.error:
            return GrammarFailed(
                f"the grammar failed after {len(self.tokens)} new tokens: {self.matcher.error}", "give a simpler one"
            )
        if is_finite and not is_draft:
            return NoTokenLeft(
                f"after {len(self.all_tokens)} tokens the parameters of the request leave no token (bad words, minimal"
                " length, constraints, a grammar, logits processors)",
                "relax them",
            )
        role, hint = ("draft", ", or draft='ngram'") if is_draft else ("target", "")
        return NonFiniteLogits(
            f"{role} {model} gave no distribution after {len(self.all_tokens)} tokens (NaN or infinite logits)",
            f"try dtype float32{hint}; if it stays, the weights of the {role} are broken",
        )

    def others(self) -> list["Request"]:
        """The further requests of a prompt with ``n > 1``. Their seeds follow from this one's, if it has one."""
        seed, count = self.params.seed, self.params.n
        seeds = [None if seed is None else _following_seed(seed, i) for i in range(1, count)]
        return [
            Request(self.prompt, replace(self.params, seed=one), *self._options, self.matcher and self.matcher.copy())
            for one in seeds
        ]

    def shares_prompt(self, other: "Request") -> bool:
        """Whether reading an equal prompt gave all that this request needs; if so, take its log-probabilities."""
        count, have = self.params.prompt_logprobs, other.params.prompt_logprobs
        if count is None:
            return True
        if have is None or have < count or other.prompt_logprobs is None:
            return False
        self.prompt_logprobs = [each and replace(each, top=each.top[:count]) for each in other.prompt_logprobs]
        return True

    def take_prompt_logits(self, start: int, logits: Tensor) -> None:
        """Keep the log-probabilities of the tokens after some of the prompt, if the request wants them.

        Args:
            start: place of the first of those tokens.
            logits: ``[1, n, V]``, at ``n`` tokens from ``start`` on.
        """
        if self.prompt_logprobs is not None and self.params.prompt_logprobs is not None:
            del self.prompt_logprobs[start + 1 :]  # Of a step that has failed.
            following = self.prompt[start + 1 : start + 1 + logits.shape[1]]
            tokens = torch.tensor([following], device=logits.device)
            self.prompt_logprobs += token_logprobs(logits, tokens, self.params.prompt_logprobs)[0]

    def append_tokens(
        self,
        tokens: Sequence[int],
        accepted: int,
        drafted: int,
        logprobs: Sequence[TokenLogprobs] | None,
        trace: StepTrace | None = None,
    ) -> FinishReason | None:
        """Emit the tokens of one step up to the end of the text; nothing after the end is emitted or counted.

        Args:
            tokens: the accepted candidates and the target's own (bonus) token; at least one token.
            accepted: how many of them are candidates.
            drafted: candidates that were verified.
            logprobs: of each token, if a request of the batch wants them; others after those are not used.
            trace: for the chunk.

        Returns:
            The finish reason; None if the text goes on, or if the request failed and has an error.
        """
        reason: FinishReason | None = None
        failure: StoppingCriterionFailed | None = None
        pieces: list[str] = []
        for token in tokens:
            self.tokens.append(token)
            pieces.append(self._stream.push(token))
            try:
                met = self._meets_criterion()
            except StoppingCriterionFailed as error:
                failure = error
                break
            if met or token in self._ends or self._stream.stopped:
                reason = "stop"
            elif len(self.tokens) == self._max_new_tokens:
                reason = "length"
            if reason:
                pieces[-1] += self._stream.finish()
                reason = "stop" if self._stream.stopped else reason
                break
        emitted = tuple(tokens[: len(pieces)])
        self.all_tokens += emitted
        if self.matcher is not None and not reason:
            self.matcher.commit(emitted)
        self._pieces += pieces
        of_chunk: tuple[TokenLogprobs, ...] | None = None
        if logprobs is not None and self.params.logprobs is not None:
            count = self.params.logprobs
            of_chunk = tuple(replace(each, top=each.top[:count]) for each in logprobs[: len(emitted)])
            self._logprobs += of_chunk
        accepted = min(accepted, len(emitted))
        self._drafted += drafted
        self._from_draft += [place < accepted for place in range(len(emitted))]
        self._histogram += [0] * (1 + accepted - len(self._histogram))
        self._histogram[accepted] += 1
        self._ended = reason is not None
        self.chunks.append(Chunk("".join(pieces), emitted, accepted, tuple(pieces), trace=trace, logprobs=of_chunk))
        self.error = self.error or failure
        return reason

    def _meets_criterion(self) -> bool:
        """Whether a stopping criterion ends the text here. Every one is called.

        Raises:
            StoppingCriterionFailed: one raised an error.
        """
        met = False
        for criterion in self.params.stopping_criteria:
            try:
                met |= bool(criterion(torch.tensor([self.prompt + self.tokens], device=self._device), None))
            except Exception as error:
                raise StoppingCriterionFailed(
                    f"a stopping criterion raised {error!r:.200}", "mend it, or leave it out"
                ) from error
        return met

    def finish(self, reason: FinishReason, seconds: Mapping[str, float]) -> None:
        """Build the completion and attach it to the last chunk."""
        stats = Stats(
            prompt_tokens=len(self.prompt),
            cached_tokens=self.reused_tokens,
            new_tokens=len(self.tokens),
            target_calls=sum(self._histogram),
            draft_tokens=self._drafted,
            accepted_tokens=sum(i * calls for i, calls in enumerate(self._histogram)),
            acceptance_histogram=tuple(self._histogram),
            seconds=seconds,
        )
        logprobs = None if self.params.logprobs is None else tuple(self._logprobs)
        prompt_logprobs = None if self.prompt_logprobs is None else tuple(self.prompt_logprobs)
        text = "".join(self._pieces)
        by_token = tuple(self._pieces), tuple(self._from_draft)
        completion = Completion(text, tuple(self.tokens), reason, logprobs, stats, prompt_logprobs, *by_token)
        self.chunks[-1] = replace(self.chunks[-1], completion=completion)
        # Another thread reads the last chunk from now on.
        self.completion = completion


class StartedText(NamedTuple):
    """A text that starts in this step: a prompt, or one whose last step has failed.

    Attributes:
        request: whose text it is.
        reused: how many of its tokens are those of an earlier text.
        hidden: the target's hidden states ``[1, n, F]`` of the others but the last, if asked for.
    """

    request: Request
    reused: int
    hidden: Tensor | None


def _following_seed(seed: int, index: int) -> int:
    """The seed of a further completion: a hash, so that it is no seed that a user gives to another request."""
    digest = hashlib.blake2b(index.to_bytes(8, "little"), key=seed.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def token_logprobs(logits: Tensor, tokens: Tensor, count: int) -> list[list[TokenLogprobs]]:
    """The log-probabilities of some tokens, and of the most probable ones in their place, in one read from the device.

    Args:
        logits: ``[B, L, V]``, of the target.
        tokens: int64 ``[B, L]``.
        count: how many of the most probable tokens.
    """
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
    parts = (tokens[..., None], logprobs.gather(2, tokens[..., None]), best.indices, best.values)
    # Token ids are exact in float64.
    table = torch.cat([part.double() for part in parts], dim=2).tolist()
    size = best.indices.shape[2]
    return [
        [
            TokenLogprobs(
                int(token), own, tuple((int(id), value) for id, value in zip(rest[:size], rest[size:], strict=True))
            )
            for token, own, *rest in each
        ]
        for each in table
    ]
