"""Runs jobs: an engine for each system, made at its first request, all on the same weights."""

import time
from collections.abc import Mapping, Sequence

from mcsd.bench.bench_models import BenchModels
from mcsd.bench.experiment import PEER, PLAIN, System, tree_name
from mcsd.bench.records import RequestRecord
from mcsd.bench.schedule import BenchJob
from mcsd.engine import Engine
from mcsd.params import SamplingParams

_WARM_UP_TOKENS = 8


class JobRunner:
    """Answers the requests of an experiment.

    Args:
        models: shared by all systems.
        prompts: token ids, by set.
        max_new_tokens: of a text.
        max_batch: the largest batch.

    Raises:
        InvalidOption: a peer does not answer.
    """

    def __init__(
        self, models: BenchModels, prompts: Mapping[str, Sequence[list[int]]], max_new_tokens: int, max_batch: int
    ) -> None:
        self._models = models
        self._prompts = prompts
        self._max_new_tokens = max_new_tokens
        self._max_batch = max_batch
        self._max_length = max(len(prompt) for texts in prompts.values() for prompt in texts) + max_new_tokens
        self._engines: dict[str, Engine] = {}
        self._warm: set[tuple[object, ...]] = set()
        for peer in models.peers.values():
            # It must not be loading its model while others are timed.
            peer.answer(next(iter(prompts.values()))[0], 0, 0.0, 1)

    def engine(self, system: System, max_batch: int | None = None) -> Engine:
        """A new engine for a system, with a cache no larger than the prompts need."""
        draft = "ngram" if system.role == PLAIN else self._models.drafts[system.draft]
        return Engine(
            target=self._models.target,
            draft=draft,
            tokenizer=self._models.tokenizer,
            tree=system.tree,
            scheme=system.scheme,
            max_batch=max_batch or self._max_batch,
            max_length=self._max_length,
            sampling_defaults="mcsd",
            prefix_cache=0,
        )

    def run(self, job: BenchJob) -> RequestRecord:
        """Answer; the first request of a system under new conditions follows a short warm-up, which is not counted.

        Raises:
            RequestError: the model's logits are not finite.
            InvalidOption: a peer gave no answer.
        """
        conditions = (job.system.name, job.temperature, len(job.numbers))
        if conditions not in self._warm:
            self._answer(job, min(_WARM_UP_TOKENS, self._max_new_tokens))
            self._warm.add(conditions)
        return self._answer(job, self._max_new_tokens)

    def _answer(self, job: BenchJob, max_new_tokens: int) -> RequestRecord:
        if not job.system.in_engine:
            return self._answer_outside(job, max_new_tokens)
        name = job.system.name
        if name not in self._engines:
            self._engines[name] = self.engine(job.system)
        engine = self._engines[name]
        prompts = [self._prompts[job.prompts][number] for number in job.numbers]
        params = [
            SamplingParams(temperature=job.temperature, max_new_tokens=max_new_tokens, seed=seed) for seed in job.seeds
        ]
        before, start = engine.seconds, time.perf_counter()
        done = engine.generate(prompts, params)
        seconds = time.perf_counter() - start
        histogram: list[int] = []
        for completion in done:
            counts = completion.stats.acceptance_histogram
            histogram += [0] * (len(counts) - len(histogram))
            for emitted, calls in enumerate(counts):
                histogram[emitted] += calls
        return _record(
            job,
            prompts,
            [list(completion.token_ids) for completion in done],
            seconds,
            parts={part: spent - before[part] for part, spent in engine.seconds.items()},
            target_calls=[completion.stats.target_calls for completion in done],
            draft_tokens=[completion.stats.draft_tokens for completion in done],
            accepted_tokens=[completion.stats.accepted_tokens for completion in done],
            histogram=histogram,
        )

    def _answer_outside(self, job: BenchJob, max_new_tokens: int) -> RequestRecord:
        """By transformers, or by a peer, which times itself."""
        prompt = self._prompts[job.prompts][job.numbers[0]]
        request = (prompt, job.seeds[0], job.temperature, max_new_tokens)
        if job.system.role == PEER:
            tokens, seconds = self._models.peers[job.system.peer].answer(*request)
        else:
            assert self._models.transformers is not None
            start = time.perf_counter()
            tokens = self._models.transformers.answer(job.system.role, *request)
            seconds = time.perf_counter() - start
        return _record(job, [prompt], [tokens], seconds)


def _record(
    job: BenchJob,
    prompts: list[list[int]],
    token_ids: list[list[int]],
    seconds: float,
    parts: dict[str, float] | None = None,
    target_calls: Sequence[int] = (),
    draft_tokens: Sequence[int] = (),
    accepted_tokens: Sequence[int] = (),
    histogram: Sequence[int] = (),
) -> RequestRecord:
    system = job.system
    return RequestRecord(
        *(system.name, system.role, system.draft, tree_name(system.tree), system.scheme),
        *(job.prompts, job.numbers, job.temperature, job.repeat, job.seeds),
        [len(prompt) for prompt in prompts],
        token_ids,
        seconds,
        parts or {},
        target_calls,
        draft_tokens,
        accepted_tokens,
        histogram,
    )
