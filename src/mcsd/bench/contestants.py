"""Systems that answer: an engine for each, made when it is first needed, all on the same weights."""

import time
from collections.abc import Mapping, Sequence

from mcsd.bench.experiment import ASSISTED, PLAIN, System
from mcsd.bench.journal import Answered
from mcsd.bench.plan import Job
from mcsd.bench.weights import Models
from mcsd.engine import Engine
from mcsd.params import SamplingParams

_WARM = 8
"""Tokens of an answer that is not counted."""


class Contestants:
    """Runs jobs.

    Args:
        models: that all share.
        prompts: token ids, by set.
        max_new_tokens: of a text.
        rows: the largest batch.
    """

    def __init__(
        self, models: Models, prompts: Mapping[str, Sequence[list[int]]], max_new_tokens: int, rows: int
    ) -> None:
        self._models = models
        self._prompts = prompts
        self._new = max_new_tokens
        self._rows = rows
        self._length = max(len(prompt) for texts in prompts.values() for prompt in texts) + max_new_tokens
        self._engines: dict[str, Engine] = {}
        self._warm: set[tuple[object, ...]] = set()

    def engine(self, system: System, rows: int | None = None) -> Engine:
        """A new engine for a system, with a cache no larger than the prompts need."""
        draft = "ngram" if system.role == PLAIN else self._models.drafts[system.draft]
        return Engine(
            target=self._models.target,
            draft=draft,
            tokenizer=self._models.tokenizer,
            tree=system.tree,
            scheme=system.scheme,
            max_batch=rows or self._rows,
            max_length=self._length,
        )

    def run(self, job: Job) -> Answered:
        """Answer, after a short answer that is not counted where the system is new to these conditions.

        Raises:
            RequestError: the model gave no distribution.
        """
        conditions = (job.system.name, job.temperature, len(job.numbers))
        if conditions not in self._warm:
            self._answer(job, min(_WARM, self._new))
            self._warm.add(conditions)
        return self._answer(job, self._new)

    def _answer(self, job: Job, new: int) -> Answered:
        if job.system.role == ASSISTED:
            return self._assisted(job, new)
        name = job.system.name
        if name not in self._engines:
            self._engines[name] = self.engine(job.system)
        engine = self._engines[name]
        prompts = [self._prompts[job.prompts][number] for number in job.numbers]
        params = [SamplingParams(temperature=job.temperature, max_new_tokens=new, seed=seed) for seed in job.seeds]
        before, start = engine.seconds, time.perf_counter()
        done = engine.generate(prompts, params)
        seconds = time.perf_counter() - start
        histogram: list[int] = []
        for completion in done:
            counts = completion.stats.acceptance_histogram
            histogram += [0] * (len(counts) - len(histogram))
            for emitted, calls in enumerate(counts):
                histogram[emitted] += calls
        return _answered(
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

    def _assisted(self, job: Job, new: int) -> Answered:
        assert self._models.assisted is not None
        prompt = self._prompts[job.prompts][job.numbers[0]]
        start = time.perf_counter()
        tokens = self._models.assisted.answer(prompt, job.seeds[0], job.temperature, new)
        return _answered(job, [prompt], [tokens], time.perf_counter() - start)


def _answered(
    job: Job,
    prompts: list[list[int]],
    token_ids: list[list[int]],
    seconds: float,
    parts: dict[str, float] | None = None,
    target_calls: Sequence[int] = (),
    draft_tokens: Sequence[int] = (),
    accepted_tokens: Sequence[int] = (),
    histogram: Sequence[int] = (),
) -> Answered:
    system = job.system
    return Answered(
        *(system.name, system.role, system.draft, system.tree, system.scheme),
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
