"""The state of one request: the tokens emitted, when the text ends, and its statistics."""

import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mcsd.detokenization import TextStream
from mcsd.errors import McsdError, NonFiniteLogits, ProcessorFailed, RequestError
from mcsd.params import Chunk, Completion, FinishReason, SamplingParams, Stats, TokenLogprobs


class Request:
    """State of one request. The engine appends the accepted tokens of each step; the request decides where it ends.

    Args:
        prompt: token ids.
        params: how to sample.
        max_new_tokens: the most new tokens that fit into the context after the prompt.
        tokenizer: for text and stop strings; may be None.
        eos_token_ids: tokens that end the text.
    """

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        max_new_tokens: int,
        tokenizer: Any | None,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.prompt = prompt
        self.params = params
        seed = secrets.randbits(64) if params.seed is None else params.seed
        self.seed = seed - (1 << 64) if seed >= 1 << 63 else seed
        """The seed's 64 bits as a signed number, as int64 holds them."""
        self.tokens: list[int] = []
        self.all_tokens = list(prompt)
        self.chunks: deque[Chunk] = deque()
        self.completion: Completion | None = None
        self.error: McsdError | None = None
        self.clock: Mapping[str, float] = {}
        """The engine's timers when the request was admitted."""
        self._max_new_tokens = min(params.max_new_tokens, max_new_tokens)
        self._stream = TextStream(tokenizer, params, prompt)
        self._eos = frozenset() if params.ignore_eos else eos_token_ids
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._histogram: list[int] = []
        self._drafted = 0
        self._ended = False

    @property
    def has_chunk(self) -> bool:
        """Whether the first of `chunks` may be taken. The last one may once the completion is on it."""
        return len(self.chunks) > 1 or (len(self.chunks) == 1 and (self.done or not self._ended))

    @property
    def done(self) -> bool:
        """Whether the text has ended or the request has failed."""
        return self.completion is not None or self.error is not None

    def failure(self) -> RequestError:
        """Why there is no distribution to go on with."""
        for processor in self.params.logits_processors:
            if (error := getattr(processor, "error", None)) is not None:
                failed = ProcessorFailed(f"a logits processor raised {error!r:.200}", "mend it, or leave it out")
                failed.__cause__ = error
                return failed
        return NonFiniteLogits(
            f"the model gave no distribution after {len(self.all_tokens)} tokens (NaN or infinite logits)",
            "try dtype float32; if it stays, the weights are broken",
        )

    def append_tokens(
        self, tokens: Sequence[int], accepted: int, drafted: int, logprobs: Sequence[TokenLogprobs] | None
    ) -> FinishReason | None:
        """Emit the tokens of one step up to the end of the text; nothing after the end is emitted or counted.

        Args:
            tokens: the accepted candidates and the target's own (bonus) token; at least one token.
            accepted: how many of them are candidates.
            drafted: candidates that were verified.
            logprobs: of each token, if a request of the batch wants them; others after those are not used.

        Returns:
            The finish reason, or None if the text goes on.
        """
        reason: FinishReason | None = None
        pieces: list[str] = []
        for token in tokens:
            self.tokens.append(token)
            pieces.append(self._stream.push(token))
            if token in self._eos or self._stream.stopped:
                reason = "stop"
            elif len(self.tokens) == self._max_new_tokens:
                reason = "length"
            if reason:
                pieces[-1] += self._stream.finish()
                reason = "stop" if self._stream.stopped else reason
                break
        emitted = tuple(tokens[: len(pieces)])
        self.all_tokens += emitted
        self._pieces += pieces
        if logprobs is not None and self.params.logprobs is not None:
            count = self.params.logprobs
            self._logprobs += [replace(each, top=each.top[:count]) for each in logprobs[: len(emitted)]]
        accepted = min(accepted, len(emitted))
        self._drafted += drafted
        self._histogram += [0] * (1 + accepted - len(self._histogram))
        self._histogram[accepted] += 1
        self._ended = reason is not None
        self.chunks.append(Chunk("".join(pieces), emitted, accepted, tuple(pieces)))
        return reason

    def finish(self, reason: FinishReason, seconds: Mapping[str, float]) -> None:
        """Build the completion and attach it to the last chunk."""
        stats = Stats(
            prompt_tokens=len(self.prompt),
            new_tokens=len(self.tokens),
            target_calls=sum(self._histogram),
            draft_tokens=self._drafted,
            accepted_tokens=sum(i * calls for i, calls in enumerate(self._histogram)),
            acceptance_histogram=tuple(self._histogram),
            seconds=seconds,
        )
        logprobs = None if self.params.logprobs is None else tuple(self._logprobs)
        completion = Completion("".join(self._pieces), tuple(self.tokens), reason, logprobs, stats)
        self.chunks[-1] = replace(self.chunks[-1], completion=completion)
        # Another thread reads the last chunk from now on.
        self.completion = completion


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
