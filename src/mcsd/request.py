"""The state of one request: the tokens emitted, when the text ends, and its statistics."""

import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mcsd.errors import McsdError
from mcsd.params import Chunk, Completion, FinishReason, SamplingParams, Stats, TokenLogprobs
from mcsd.tokenization import TextStream


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
        self._stream = TextStream(tokenizer, params.stop)
        self._eos = frozenset() if params.ignore_eos else eos_token_ids
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._histogram: list[int] = []
        self._drafted = 0

    @property
    def done(self) -> bool:
        """Whether the text has ended or the request has failed."""
        return self.completion is not None or self.error is not None

    def append_tokens(
        self, tokens: Sequence[int], accepted: int, drafted: int, logits: Tensor | None
    ) -> FinishReason | None:
        """Emit the tokens of one step up to the end of the text; nothing after the end is emitted or counted.

        Args:
            tokens: the accepted candidates and the target's own (bonus) token; at least one token.
            accepted: how many of them are candidates.
            drafted: candidates that were verified.
            logits: ``[len(tokens), V]``, the target's for each token, if log-probabilities are requested.

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
        if logits is not None:
            self._logprobs += _logprobs(emitted, logits, self.params.logprobs or 0)
        accepted = min(accepted, len(emitted))
        self._drafted += drafted
        self._histogram += [0] * (1 + accepted - len(self._histogram))
        self._histogram[accepted] += 1
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
        self.completion = Completion("".join(self._pieces), tuple(self.tokens), reason, logprobs, stats)
        last = self.chunks.pop()
        self.chunks.append(Chunk(last.text, last.token_ids, last.accepted, last.pieces, self.completion))


def _logprobs(tokens: Sequence[int], logits: Tensor, count: int) -> list[TokenLogprobs]:
    logprobs = logits[: len(tokens)].float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = (part.tolist() for part in logprobs.topk(min(count, logprobs.shape[-1]), dim=-1))
    return [
        TokenLogprobs(token, value, tuple(zip(top, best, strict=True)))
        for token, value, top, best in zip(tokens, own, ids, values, strict=True)
    ]
