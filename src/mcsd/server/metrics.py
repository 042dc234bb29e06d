"""Metrics for Prometheus, in a registry of their own. Where vLLM has a metric it has vLLM's name."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mcsd.results import Stats

if TYPE_CHECKING:
    from mcsd.async_engine import AsyncEngine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_LABELS = ("model_name", "engine")


class Metrics:
    """Counts what requests do.

    Args:
        model: name of the model, a label of every metric.
        engine: returns the engine; None while it is loading.
        state: returns the state of the server, as ``/ready`` tells it.
        name: of the engine, among those of several processes.
    """

    def __init__(
        self,
        model: Callable[[], str],
        engine: Callable[[], "AsyncEngine | None"],
        state: Callable[[], str],
        name: str = "0",
    ):
        self._name = name
        self._registry = CollectorRegistry(auto_describe=True)
        self._model, self._engine, self._state = model, engine, state
        self._registry.register(self)
        self._drafts = self._counter("vllm:spec_decode_num_drafts", "Target calls that verified candidates.")
        self._draft_tokens = self._counter("vllm:spec_decode_num_draft_tokens", "Candidates verified.")
        self._accepted = self._counter("vllm:spec_decode_num_accepted_tokens", "Candidates accepted and emitted.")
        self._accepted_at = self._counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Candidates accepted, by their place after the root.",
            "position",
        )
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts.")
        self._cached_tokens = self._counter("vllm:prompt_tokens_cached", "Tokens of prompts that were not read again.")
        self._new_tokens = self._counter("vllm:generation_tokens", "Tokens emitted.")
        self._ended = self._counter("vllm:request_success", "Texts that have ended.", "finished_reason")
        self._failed = self._counter("mcsd:request_failure", "Texts that have failed, by error.", "error")
        self._first = self._histogram("vllm:time_to_first_token_seconds", "From the request to its first tokens.")
        self._between = self._histogram("vllm:inter_token_latency_seconds", "Between the steps of a text.")
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "From the request to the end of its text.")
        self._answers = Counter(
            "mcsd:http_responses", "Answers, by route and status.", ("route", "status"), registry=self._registry
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, (*_LABELS, *labels), registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, _LABELS, registry=self._registry, buckets=_SECONDS)

    def _own(self) -> tuple[str, str]:
        return self._model(), self._name

    def observe_chunk(self, tokens: int, seconds: float, is_first: bool) -> None:
        """Count the tokens of a step of a text.

        Args:
            tokens: emitted.
            seconds: since the request, or since the text's step before.
            is_first: whether it is the text's first step.
        """
        self._new_tokens.labels(*self._own()).inc(tokens)
        (self._first if is_first else self._between).labels(*self._own()).observe(seconds)

    def observe_end(self, reason: str, stats: Stats, seconds: float) -> None:
        """Count a text that has ended."""
        own = self._own()
        self._ended.labels(*own, reason).inc()
        self._whole.labels(*own).observe(seconds)
        self._prompt_tokens.labels(*own).inc(stats.prompt_tokens)
        self._cached_tokens.labels(*own).inc(stats.cached_tokens)
        if stats.draft_tokens:
            self._drafts.labels(*own).inc(stats.target_calls)
            self._draft_tokens.labels(*own).inc(stats.draft_tokens)
            self._accepted.labels(*own).inc(stats.accepted_tokens)
            for position in range(len(stats.acceptance_histogram) - 1):
                count = sum(stats.acceptance_histogram[position + 1 :])
                self._accepted_at.labels(*own, str(position)).inc(count)

    def observe_failure(self, error: BaseException) -> None:
        """Count a text that has failed or was cancelled."""
        self._failed.labels(*self._own(), type(error).__name__).inc()

    def observe_answer(self, route: str, status: int) -> None:
        """Count an answer."""
        self._answers.labels(route, str(status)).inc()

    def collect(self) -> Iterator[Metric]:
        """What the engine itself knows, when Prometheus asks."""
        ready = GaugeMetricFamily("mcsd:ready", "Whether the server is ready.", labels=("engine", "state"))
        ready.add_metric([self._name, self._state()], float(self._state() == "ready"))
        yield ready
        engine = self._engine()
        if engine is None:
            return
        status, own = engine.status, self._own()
        for name, text, value in (
            ("vllm:num_requests_running", "Texts in the batch.", status.running),
            ("vllm:num_requests_waiting", "Texts that wait for a place in it.", status.waiting),
        ):
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            gauge.add_metric(own, value)
            yield gauge
        leaked = CounterMetricFamily("mcsd:leaked_sequences", "Sequences in use without a request.", labels=_LABELS)
        leaked.add_metric(own, engine.leaked_sequences)
        yield leaked
        parts = CounterMetricFamily("mcsd:step_seconds", "Wall time of steps, by part.", labels=(*_LABELS, "part"))
        for part, seconds in engine.engine.seconds.items():
            parts.add_metric((*own, part), seconds)
        yield parts

    def text(self) -> bytes:
        """All metrics in Prometheus' format."""
        return generate_latest(self._registry)
