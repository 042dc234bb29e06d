"""The target writes the text that its draft learns from, many rows at a time.

Where the target has a chat template, it invents the user's turn too (Magpie, Xu et al. 2024, arXiv 2406.08464): it is
given the template up to where a user would speak. Temperatures are mixed, because a draft serves at all of them.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mcsd.distill.corpus import Corpus, Record
from mcsd.distill.recorder import Recorder
from mcsd.engine import Engine
from mcsd.errors import DataError, PromptTooLong
from mcsd.files import SAVE_SECONDS
from mcsd.models.prefill import prefill
from mcsd.params import SamplingParams
from mcsd.request import Request

TEMPERATURES = (0.0, 0.7, 1.0)
"""Answers take turns at these."""

_MARK = "USER-TURN"
_TURN_TOKENS = 96

_BARREN = 1000
"""Requests in a row without a text after which the target is held to be broken."""

Progress = Callable[[int], None]
"""Called with the tokens written so far."""


@dataclass(frozen=True)
class Job:
    """Text number ``index``: a request, and what to ask when it has ended; None records it."""

    index: int
    request: Request
    then: Callable[[Request], "Job | None"] | None = None


Source = Callable[[int], Job | None]
"""Text number i of a source; None where the source has no such text."""


def invented(engine: Engine, seed: int, length: int) -> Source:
    """Conversations that the target makes up: a user's turn, then its answer; raw text where it has no template."""
    tokenizer: Any = engine.tokenizer
    if not engine.encoder.chats:
        marks = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
        start = next((token for token in marks if token is not None), 0)
        # Not at temperature 0, where one beginning has one continuation.
        return lambda i: Job(i, engine.request([start], _sampling(i, seed, length, TEMPERATURES[1:])))
    turn = [{"role": "user", "content": _MARK}]
    opening, _, _ = tokenizer.apply_chat_template(turn, tokenize=False).partition(_MARK)
    prefix = tokenizer(opening, add_special_tokens=False)["input_ids"]

    def answer(i: int, ended: Request) -> Job | None:
        said = ended.completion.text.strip() if ended.completion else ""
        if not said:
            return None
        return Job(
            i, engine.request(engine.chat_tokens([{"role": "user", "content": said}]), _sampling(i, seed, length))
        )

    def conversation(i: int) -> Job:
        params = SamplingParams(top_p=0.95, max_new_tokens=_TURN_TOKENS, seed=_seed(seed, i, 0))
        return Job(i, engine.request(prefix, params), lambda ended: answer(i, ended))

    return conversation


def answers(engine: Engine, prompts: list[str], seed: int, length: int) -> Source:
    """Answers to given prompts, in the chat template if there is one; each prompt once.

    Raises:
        DataError: a prompt is too long.
    """
    requests = []
    for i, text in enumerate(prompts):
        try:
            requests.append(engine.request(engine.encoder.ask(text), _sampling(i, seed, length)))
        except PromptTooLong as error:
            raise DataError(f"prompt {i + 1}: {error.message}", "shorten it or leave it out") from error
    return lambda i: Job(i, requests[i]) if i < len(requests) else None


def write(
    engine: Engine,
    recorder: Recorder,
    source: Source,
    corpus: Corpus,
    tokens: int,
    seconds: float,
    progress: Progress,
) -> None:
    """Let the engine write until the corpus holds ``tokens`` tokens, ``seconds`` are over, or the source is used up.

    Args:
        engine: decodes plainly, with ``recorder`` as its drafter.
        recorder: keeps the hidden states.
        source: what to write; a text that the corpus has is not written again.
        corpus: where to.
        tokens: in all, with what the corpus has.
        seconds: the same. Of texts that have not ended by then the part that is written is kept.
        progress: told now and then.

    Raises:
        DataError: the target writes nothing.
    """
    done = frozenset(corpus.lengths)
    fresh = (i for i in itertools.count() if i not in done)
    running: list[Job] = []
    used_up = False
    barren = 0
    saved = time.monotonic()
    deadline = saved + seconds - corpus.seconds
    try:
        while corpus.tokens < tokens and time.monotonic() < deadline:
            while len(running) < engine.max_batch and not used_up:
                job = source(next(fresh))
                used_up = job is None
                if job:
                    running.append(job)
                    engine.submit(job.request)
            if not running:
                break
            engine.step()
            for fruitful in _settle(engine, recorder, corpus, running):
                barren = 0 if fruitful else barren + 1
            recorder.forget()
            if barren > _BARREN:
                raise DataError(f"{engine.target_name} wrote nothing {barren} times in a row", "are its weights whole?")
            if time.monotonic() - saved > SAVE_SECONDS:
                corpus.save(_begun(running, recorder))
                saved = time.monotonic()
            progress(corpus.tokens)
    finally:
        for record in _begun(running, recorder):
            corpus.add(record)
        corpus.save()
        for job in running:
            engine.cancel(job.request)


def read(
    engine: Engine,
    recorder: Recorder,
    texts: list[str],
    length: int,
    corpus: Corpus,
    tokens: int,
    seconds: float,
    progress: Progress,
) -> None:
    """Let the target read given texts, cut into pieces of at most ``length`` tokens: ``tokens`` or ``seconds`` of it.

    Raises:
        DataError: there is no text in them, or nothing to make tokens of it.
    """
    pieces: list[list[int]] = []
    tokenizer: Any = engine.tokenizer
    if tokenizer is None:
        raise DataError(f"{engine.target_name} has no tokenizer to read text with", "leave --data out")
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        pieces += [ids[start : start + length] for start in range(0, len(ids), length)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise DataError("the text to learn from is empty", "give files that hold text")
    saved = time.monotonic()
    deadline = saved + seconds - corpus.seconds
    try:
        for i, piece in enumerate(pieces):
            if i in corpus.lengths:
                continue
            if corpus.tokens >= tokens or time.monotonic() > deadline:
                break
            cache = engine.target.new_cache(1, len(piece))
            states = prefill(engine.target, cache, cache.add(), piece, recorder.hidden)
            assert states is not None
            corpus.add(Record(i, torch.tensor(piece, dtype=torch.int32), states[0].to("cpu", torch.bfloat16), 0))
            if time.monotonic() - saved > SAVE_SECONDS:
                corpus.save()
                saved = time.monotonic()
            progress(corpus.tokens)
    finally:
        corpus.save()


def _settle(engine: Engine, recorder: Recorder, corpus: Corpus, running: list[Job]) -> list[bool]:
    """Keep what has ended and begin what follows it; for each that has ended, whether there was anything of either."""
    fruitful = []
    for job in [job for job in running if job.request.done]:
        running.remove(job)
        follows = _follows(job)
        if follows:
            running.append(follows)
            engine.submit(follows.request)
        record = _record(job, recorder)
        if record:
            corpus.add(record)
        fruitful.append(bool(follows or record))
    return fruitful


def _follows(job: Job) -> Job | None:
    return job.then(job.request) if job.then and job.request.completion else None


def _record(job: Job, recorder: Recorder) -> Record | None:
    """What is written of a text, if there is something to keep."""
    text = job.request.all_tokens
    # The last token has been emitted and not been read.
    if job.then or job.request.error or len(text) < len(job.request.prompt) + 2:
        return None
    states = recorder.states(text).to("cpu", torch.bfloat16)
    return Record(job.index, torch.tensor(text[:-1], dtype=torch.int32), states, len(job.request.prompt))


def _begun(running: list[Job], recorder: Recorder) -> list[Record]:
    return [record for job in running if (record := _record(job, recorder))]


def _sampling(i: int, seed: int, length: int, temperatures: Sequence[float] = TEMPERATURES) -> SamplingParams:
    temperature = temperatures[i % len(temperatures)]
    return SamplingParams(temperature=temperature, max_new_tokens=length, seed=_seed(seed, i, 1))


def _seed(seed: int, i: int, part: int) -> int:
    return (seed * 1_000_003 + 2 * i + part) % (1 << 63)
