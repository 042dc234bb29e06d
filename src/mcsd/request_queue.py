"""Requests that wait for the engine: made from prompts and sampling parameters, submitted, cancelled, run to their end.

Several threads may use one queue. One of them steps the engine for the requests of all.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

from mcsd.defaults import combine
from mcsd.errors import InvalidParameter, McsdError, RequestError, RequestInterrupted, check_token_ids
from mcsd.generation_config import constraint_fields, is_generation_config
from mcsd.grammars import GrammarCompiler
from mcsd.models import LanguageModel
from mcsd.params import SamplingParams
from mcsd.processors import request_processors
from mcsd.request import Request
from mcsd.results import Completion
from mcsd.step_lock import StepLock
from mcsd.tokenization import Prompt, PromptEncoder

_UNLIMITED = 1 << 20


def request_length(max_length: int | None, target: LanguageModel) -> int:
    """The most tokens of a request: ``max_length``, if given, and at most the target's context."""
    return min(length or _UNLIMITED for length in (max_length, target.max_length))


class RequestQueue(ABC):
    """The waiting requests of an engine, which a subclass steps.

    Args:
        target: the target.
        tokenizer: of the target; without one, prompts are token ids and there is no text.
        max_length: the most tokens of a request, prompt included.
        defaults: sampling parameters of requests that have none of their own.
        generation_config: of the model, whose constraints hold for all requests; see `mcsd.generation_config`.
    """

    def __init__(
        self,
        target: LanguageModel,
        tokenizer: Any | None,
        max_length: int,
        defaults: SamplingParams | None,
        generation_config: Any,
    ) -> None:
        self.target = target
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.defaults = SamplingParams() if defaults is None else defaults
        self.encoder = PromptEncoder(tokenizer, target.name, target.vocab_size, max_length)
        self._generation_config = generation_config
        eos = check_token_ids("eos_token_id of the tokenizer", getattr(tokenizer, "eos_token_id", None))
        self._eos = target.eos_token_ids | eos
        self._grammars = GrammarCompiler(tokenizer, target.vocab_size, self._eos)
        self._waiting: deque[Request] = deque()
        self._cancelled: deque[Request] = deque()
        self._step_lock = StepLock()

    def request(self, prompt: Prompt, params: Any = None, **fields: Any) -> Request:
        """A request for `submit`.

        Args:
            prompt: a text or token ids.
            params, fields: sampling parameters, see `mcsd.defaults.combine`.

        Raises:
            RequestError: the prompt or a parameter is wrong, or asks for several completions.
        """
        first, *others = self.requests(prompt, params, **fields)
        if others:
            raise InvalidParameter(
                f"n={first.params.n}: a request or stream has one completion", "use generate or chat, or n=1"
            )
        return first

    def requests(self, prompt: Prompt, params: Any = None, **fields: Any) -> list[Request]:
        """The requests of one prompt: as many as the sampling parameter ``n`` says. See `request`."""
        configs = [params] if is_generation_config(params) else []
        constraints = constraint_fields(*configs, self._generation_config)
        params = combine(self.defaults, params, fields)
        ids = self.encoder.encode(prompt, params)
        params = self.encoder.encode_prediction(params)
        bad_words = self.encoder.encode_words(params.bad_words)
        space = self.max_length - len(ids)
        most = min(space, params.max_new_tokens)
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self._eos)}
        params = request_processors(params, constraints, len(ids), most, sorted(ends), bad_words, self.target.device)
        matcher = self._grammars.matcher(params, ends)
        first = Request(ids, params, space, self.tokenizer, self._eos, self.target.device, matcher)
        return [first, *first.others()]

    def submit(self, request: Request) -> None:
        """Queue a request until a sequence is free."""
        self._waiting.append(request)

    def cancel(self, request: Request, error: McsdError | None = None) -> None:
        """End a waiting or running request with an error, by default `RequestInterrupted`.

        Its sequence is free at once, or at the next step if another thread is stepping. Never waits.
        """
        if not request.done:
            request.error = error or RequestInterrupted("the request was cancelled", "submit it again")
            self._cancelled.append(request)
            self._step_lock.try_run(self._free_cancelled)

    def run(self, requests: list[Request], advance: Callable[[], None] = lambda: None) -> list[Completion]:
        """Run requests to their end.

        Args:
            requests: to be submitted.
            advance: called when a request has ended, and those before it.

        Raises:
            RequestError: the first request that failed; its ``completions`` are those of the others.
        """
        for request in requests:
            self.submit(request)
        try:
            for request in requests:
                self.run_until(lambda request=request: request.done)  # type: ignore[misc]
                advance()
        finally:
            for request in requests:
                self.cancel(request)
        for request in requests:
            if isinstance(request.error, RequestError):
                request.error.completions = tuple(other.completion for other in requests)
                raise request.error
        return [request.completion for request in requests if request.completion is not None]

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Step until a condition is true, or wait while another thread does."""
        while not condition():
            self._step_lock.run(self._step, unless=condition)

    def step(self) -> None:
        """Advance every sequence by at least one token. Requests receive what was emitted for them.

        While another thread is stepping, wait; if it has gone on with a next step meanwhile, there is nothing to do.

        If a step of several requests raises an error, nobody knows whose it is, and their caches may be ahead of their
        texts. Each then takes a step alone, after its text is read again; the one at fault ends with `StepFailed`, and
        the others go on together. An interrupt (Ctrl-C) ends the running requests with `RequestInterrupted`. Waiting
        requests stay, and the engine goes on.

        Raises:
            EngineBusy: called from inside a step.
            BaseException: an interrupt, or the error of a step of one request.
        """
        self._step_lock.run(self._step, unless=self._step_lock.released_by_another())

    def _next(self, running: list[Request]) -> Request | None:
        """Take the next request that may join the running ones, if there is one."""
        if not self._waiting or (running and (running[0].alone or self._waiting[0].alone)):
            return None
        return self._waiting.popleft()

    def _wait_alone(self, requests: list[Request]) -> None:
        """Put the requests of a failed step first in the queue. Each takes its next step alone."""
        for request in requests:
            request.alone = True
        self._waiting.extendleft(reversed(requests))

    def _wait_for_others(self, request: Request) -> bool:
        """After a step alone, queue a request behind those that have not taken theirs. False if there are none."""
        request.alone = False
        left = sum(each.alone for each in self._waiting)
        if left:
            self._waiting.insert(left, request)
        return left > 0

    @abstractmethod
    def _step(self) -> None:
        """`step`, while no other thread steps."""

    @abstractmethod
    def free_leaked(self) -> int:
        """While no request runs or waits, free the sequences that are still in use, and return their number."""

    @abstractmethod
    def _free_cancelled(self) -> None:
        """Free the sequences of cancelled requests."""
