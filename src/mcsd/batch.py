"""The batch of an engine: running requests, and their sequences in the caches of target and drafter."""

from typing import Any

from mcsd.drafters import Drafter
from mcsd.drafters.make import cache_slots
from mcsd.errors import step_error
from mcsd.models import LanguageModel
from mcsd.models.prefix_cache import PrefixCache
from mcsd.params import SamplingParams
from mcsd.request import Request
from mcsd.request_queue import RequestQueue, request_length


class Batch(RequestQueue):
    """Running requests. The i-th one is sequence i of the target's cache and of the drafter.

    Args:
        target, drafter: have the sequences.
        max_batch: requests that run together, at most; others wait.
        max_length: the most tokens of a request, prompt included; at most the target's context, which is the default.
        max_nodes: of the largest tree.
        max_texts: of the prefix cache; 0: none.
        tokenizer, defaults, generation_config: see `RequestQueue`.

    Attributes:
        cache: of the target.
        prefixes: the prefix cache of the target; a drafter that reads has its own.
    """

    def __init__(
        self,
        target: LanguageModel,
        drafter: Drafter,
        max_batch: int,
        max_length: int | None,
        max_nodes: int,
        max_texts: int,
        tokenizer: Any | None,
        defaults: SamplingParams | None,
        generation_config: Any,
    ) -> None:
        super().__init__(target, tokenizer, request_length(max_length, target), defaults, generation_config)
        self.drafter = drafter
        self.max_batch = max_batch
        self.cache = target.new_cache(max_batch, cache_slots(self.max_length, max_nodes))
        self.prefixes = PrefixCache(self.cache, max_texts)
        self._running: list[Request] = []
        self._has_changed = True  # A subclass that has looked at them resets it.

    def free_leaked(self) -> int:
        """While no request runs or waits, free the sequences that are still in use, and return their number.

        It is 0 unless mcsd or a drafter has a fault. While another thread is stepping nothing is done.
        """
        leaked = 0

        def free() -> None:
            nonlocal leaked
            self._free_cancelled()
            if not self._running and not self._waiting:
                leaked = max(self.cache.batch_size, self.drafter.sequences)
                if leaked:
                    self._clear()

        self._step_lock.try_run(free)
        return leaked

    def _keep(self, index: int) -> None:
        """Keep what was read of a sequence for later prompts. Its last step gave a distribution, so it holds no NaN."""
        if self.prefixes.max_texts:
            tokens = self._running[index].all_tokens
            self.prefixes.keep(index, tokens)
            self.drafter.keep(index, tokens)

    def _free_cancelled(self) -> None:
        while self._cancelled:
            request = self._cancelled.popleft()
            if request in self._running:
                index = self._running.index(request)
                self._keep(index)
                self._free(index)
            elif request in self._waiting:
                self._waiting.remove(request)

    def _free(self, index: int) -> None:
        self.cache.remove(index)
        self.drafter.remove(index)
        self._running[index] = self._running[-1]
        self._running.pop()
        self._has_changed = True

    def _end_step_alone(self) -> None:
        if self._running and self._running[0].alone and self._wait_for_others(self._running[0]):
            self._keep(0)
            self._free(0)

    def _abort(self, error: BaseException) -> bool:
        """Empty the batch after an error. Returns whether its requests go on, each alone."""
        requests = [request for request in self._running if not request.done]
        self._running.clear()
        self._has_changed = True
        self._clear()
        if isinstance(error, Exception) and len(requests) > 1:
            self._wait_alone(requests)
            return True
        for request in requests:
            request.error = step_error(error)
        return False

    def _clear(self) -> None:
        self.cache.clear()
        self.drafter.clear()
