"""An engine that several threads use: each has the texts that it has alone, in shared batches."""

from functools import partial
from typing import Any

import pytest

import mcsd
from mcsd import SamplingParams, errors
from mcsd.step_lock import StepLock
from support.exact import exact, random_tokens
from support.threads import LIMIT, Gate, Thread, Watched, together, wait_for

LONG = SamplingParams(seed=5, max_new_tokens=40)
SHORT = SamplingParams(temperature=0, max_new_tokens=3)


def tabular_engine(target: Watched | None = None, **options: Any) -> mcsd.Engine:
    return mcsd.Engine(target or Watched(), Watched(seed=1), **({"tree": "2x1", "max_length": 200} | options))


def alone(prompt: list[int], params: SamplingParams) -> tuple[int, ...]:
    return tuple(tabular_engine().generate(prompt, params).token_ids)


@pytest.mark.parametrize("tree", ["none", "2x2x1"])
def test_every_thread_has_its_own_text(tree: str) -> None:
    engine = mcsd.Engine(exact("llama", 0), exact("llama", 1), tree=tree, max_batch=3)
    jobs = [
        (random_tokens(i, 1 + i), SamplingParams(temperature=i % 2, seed=i, max_new_tokens=5 + i)) for i in range(12)
    ]
    expected = [engine.generate(*job).token_ids for job in jobs]

    def generate(start: int) -> list[tuple[int, ...]]:
        return [engine.generate(*job).token_ids for job in jobs[start::4]]

    def stream(start: int) -> list[tuple[int, ...]]:
        return [tuple(id for chunk in engine.stream(*job) for id in chunk.token_ids) for job in jobs[start::4]]

    found = together([partial(generate, 0), partial(stream, 1), partial(generate, 2), partial(stream, 3)])
    assert found == [expected[start::4] for start in range(4)]


def test_requests_of_two_threads_share_a_batch() -> None:
    target, gate = Watched(), Gate()
    engine = tabular_engine(target)
    target.before = gate
    first = Thread(lambda: engine.generate([1], LONG).token_ids)
    assert gate.reached.wait(LIMIT)
    second = Thread(lambda: engine.generate([2], SHORT).token_ids)
    wait_for(lambda: len(engine._waiting) == 1)
    target.before = lambda: None
    gate.open()
    assert (first.result(), second.result()) == (alone([1], LONG), alone([2], SHORT))
    assert target.batches[0] == 1
    assert 2 in target.batches


def test_a_thread_leaves_when_its_own_request_is_done() -> None:
    target, gate = Watched(), Gate()
    engine = tabular_engine(target, tree="none")
    target.before = gate
    long = Thread(lambda: engine.generate([1], temperature=0, max_new_tokens=40).token_ids)
    assert gate.reached.wait(LIMIT)
    short = Thread(lambda: engine.generate([2], SHORT).token_ids)
    wait_for(lambda: len(engine._waiting) == 1)
    gate.open(1 + SHORT.max_new_tokens)
    # The other thread stands in the midst of a step.
    assert short.result() == alone([2], SHORT)
    assert long.is_running
    target.before = lambda: None
    gate.open()
    assert long.result() == alone([1], SamplingParams(temperature=0, max_new_tokens=40))


def test_drivers_in_two_threads() -> None:
    engine = tabular_engine()
    requests = [engine.request([i], LONG) for i in range(4)]

    def drive(mine: list[Any]) -> None:
        for request in mine:
            engine.submit(request)
        while not all(request.done for request in mine):
            engine.step()

    assert together([partial(drive, requests[:2]), partial(drive, requests[2:])]) == [None, None]
    assert [tuple(request.tokens) for request in requests] == [alone([i], LONG) for i in range(4)]


def test_calls_between_the_chunks_of_a_stream() -> None:
    engine = tabular_engine(max_batch=2)
    stream = engine.stream([1], LONG)
    tokens: list[int] = []
    for chunk in stream:
        tokens += chunk.token_ids
        assert engine.generate([2], SHORT).token_ids == alone([2], SHORT)
    assert tuple(tokens) == alone([1], LONG)


def test_the_last_chunk_is_not_read_before_the_completion_is_on_it() -> None:
    engine = tabular_engine()
    request = engine.request([1], max_new_tokens=3)
    assert request.append_tokens([4], 0, 1, None) is None
    assert request.has_chunk
    assert request.append_tokens([4, 5], 1, 1, None) == "length"
    request.chunks.popleft()
    # Another thread stands here, in the midst of its step.
    assert not request.has_chunk
    request.finish("length", {})
    assert request.has_chunk
    assert request.chunks[0].completion is request.completion


def test_a_step_that_calls_its_own_engine_is_refused() -> None:
    target = Watched()
    engine = tabular_engine(target)
    target.before = lambda: engine.generate([3], SHORT)
    assert isinstance(Thread(lambda: engine.generate([1], SHORT)).result(), errors.EngineBusy)
    target.before = lambda: None
    assert engine.generate([1], SHORT).token_ids == alone([1], SHORT)


def test_cancel_during_the_step_of_another_thread() -> None:
    target, gate = Watched(), Gate()
    engine = tabular_engine(target)
    running, waiting, bystander = (engine.request(prompt, LONG) for prompt in ([1], [2], [3]))
    target.before = gate
    thread = Thread(lambda: engine.run([running, bystander]))
    assert gate.reached.wait(LIMIT)
    engine.submit(waiting)
    for request in (running, waiting):
        engine.cancel(request)
        assert isinstance(request.error, errors.RequestInterrupted)
    target.before = lambda: None
    gate.open()
    assert isinstance(thread.result(), errors.RequestInterrupted)
    assert tuple(bystander.tokens) == alone([3], LONG)
    assert not running.completion
    assert not waiting.tokens
    assert not engine._running
    assert not engine._waiting


def test_a_stream_that_is_collected_in_the_midst_of_a_step() -> None:
    target = Watched()
    engine = tabular_engine(target)
    streams = [engine.stream([1], LONG)]
    next(streams[0])

    target.before = streams.clear
    assert Thread(lambda: engine.generate([2], LONG).token_ids).result() == alone([2], LONG)
    assert not engine._running


def test_an_error_in_the_step_of_another_thread_is_named() -> None:
    target, gate = Watched(), Gate()
    engine = tabular_engine(target)
    target.before = gate
    first = Thread(lambda: engine.generate([1], LONG))
    assert gate.reached.wait(LIMIT)
    second = Thread(lambda: engine.generate([2], LONG))
    wait_for(lambda: len(engine._waiting) == 1)

    def fail() -> None:
        raise KeyboardInterrupt

    # The first thread steps alone, then with the other; it mostly keeps the lock, but need not.
    target.before = lambda: fail() if len(engine._running) == 2 else None
    gate.open()
    ends = [first.result(), second.result()]
    assert sorted(type(end).__name__ for end in ends) == ["KeyboardInterrupt", "RequestInterrupted"]
    target.before = lambda: None
    assert engine.generate([1], LONG).token_ids == alone([1], LONG)


def test_one_thread_calibrates_and_the_others_wait() -> None:
    engine = tabular_engine(tree="auto")
    found = together([lambda: engine.generate([1], temperature=0, max_new_tokens=9).token_ids] * 3)
    assert found == [tabular_engine().generate([1], temperature=0, max_new_tokens=9).token_ids] * 3


def test_an_interrupted_thread_does_not_keep_the_lock() -> None:
    lock = StepLock()

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lock.run(fail, unless=lambda: False)
    with pytest.raises(KeyboardInterrupt):
        lock.run(lambda: None, unless=fail)  # type: ignore[arg-type,return-value]
    done: list[int] = []
    Thread(lambda: lock.run(lambda: done.append(1), unless=lambda: False)).result()
    assert done == [1]


def test_nothing_waits_in_try_run() -> None:
    lock, calls = StepLock(), []

    def inside() -> None:
        lock.try_run(lambda: calls.append("inside"))
        Thread(lambda: lock.try_run(lambda: calls.append("another thread"))).result()

    lock.run(inside, unless=lambda: False)
    lock.try_run(lambda: calls.append("free"))
    assert calls == ["free"]
