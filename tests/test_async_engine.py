"""The engine for asyncio: right texts, bounded queues, and an end for every request, whatever happens."""

import asyncio
import gc
import threading
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

import pytest
import torch

import mcsd
from mcsd import AsyncEngine, SamplingParams, async_engine, errors
from mcsd.async_engine import AsyncRequest
from support.threads import LIMIT, Gate, Thread, Watched, wait_for

LONG = SamplingParams(seed=5, max_new_tokens=40)
SHORT = SamplingParams(temperature=0, max_new_tokens=3)
T = TypeVar("T")


def tabular_engine(target: Watched | None = None, **options: Any) -> mcsd.Engine:
    return mcsd.Engine(target or Watched(), Watched(seed=1), **({"tree": "2x1", "max_length": 200} | options))


def alone(prompt: list[int], params: SamplingParams) -> tuple[int, ...]:
    return tuple(tabular_engine().generate(prompt, params).token_ids)


def run(main: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(main, LIMIT)

    return asyncio.run(limited())


async def reached(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.reached.wait, LIMIT)


async def ends(waits: Awaitable[T]) -> T | BaseException:
    """The result, or the error as an object."""
    (end,) = await asyncio.gather(waits, return_exceptions=True)
    return end


async def tokens_of(request: AsyncRequest) -> tuple[int, ...]:
    return tuple([id async for chunk in request for id in chunk.token_ids])


def test_sequences_that_a_drafter_leaks_are_freed_and_counted() -> None:
    engine = tabular_engine(max_batch=2)
    remove, kept = engine.drafter.remove, iter([True])
    engine.drafter.remove = lambda sequence: None if next(kept, False) else remove(sequence)  # type: ignore[method-assign]

    async def main() -> None:
        async with AsyncEngine(engine) as served:
            assert (await served.generate([1], LONG)).token_ids == alone([1], LONG)
            await asyncio.to_thread(wait_for, lambda: served.leaked_sequences == 1)
            assert (await served.generate([2], LONG)).token_ids == alone([2], LONG)
            assert served.leaked_sequences == 1

    run(main())


def test_tasks_share_a_batch() -> None:
    target = Watched()

    async def main() -> None:
        async with AsyncEngine(tabular_engine(target, max_batch=4)) as engine:
            done = await asyncio.gather(*(engine.generate([i], LONG) for i in range(9)))
            assert [one.token_ids for one in done] == [alone([i], LONG) for i in range(9)]

    run(main())
    assert max(target.batches) == 4


def test_a_stream_has_the_text_and_ends_with_the_completion() -> None:
    async def main() -> None:
        async with AsyncEngine(tabular_engine()) as engine:
            chunks = [chunk async for chunk in engine.stream([1], LONG)]
            assert tuple(id for chunk in chunks for id in chunk.token_ids) == alone([1], LONG)
            assert [chunk.completion is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
            completion = chunks[-1].completion
            assert completion is not None
            assert completion.token_ids == alone([1], LONG)
            assert all(chunk.accepted <= len(chunk.token_ids) for chunk in chunks)

    run(main())


@pytest.mark.parametrize("way", ["close", "break", "task", "cancel", "timeout"])
def test_a_request_whose_reader_leaves_is_cancelled(way: str) -> None:
    endless = SamplingParams(max_new_tokens=1 << 19)

    async def main() -> None:
        async with AsyncEngine(tabular_engine(max_length=1 << 20)) as engine:
            bystander = await engine.submit([2], LONG)
            if way == "close":
                stream = engine.stream([1], endless)
                await anext(stream)
                await stream.aclose()
            elif way == "break":
                async for _ in await engine.submit([1], endless):
                    break
                gc.collect()
            elif way == "task":
                task = asyncio.create_task(engine.generate([1], endless))
                while not engine.engine._running:
                    await asyncio.sleep(0.001)
                task.cancel()
                assert isinstance(await ends(task), asyncio.CancelledError)
            elif way == "timeout":
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(engine.generate([1], endless), 0.02)
            else:
                request = await engine.submit([1], endless)
                request.cancel()
                assert isinstance(await ends(request.completion()), errors.RequestInterrupted)
            assert await tokens_of(bystander) == alone([2], LONG)
            while engine.status[:2] != (0, 0):
                await asyncio.sleep(0.001)
        assert not engine.engine._running

    run(main())


def test_too_many_requests_are_refused_and_the_others_end() -> None:
    target, gate = Watched(), Gate()
    target.before = gate

    async def main() -> None:
        async with AsyncEngine(tabular_engine(target, max_batch=1), max_waiting=2) as engine:
            accepted = [await engine.submit([i], SHORT) for i in range(3)]
            await reached(gate)
            assert engine.status[:2] == (1, 2)
            with pytest.raises(errors.EngineBusy, match="2 requests are waiting: 1 more exceed max_waiting=2"):
                await engine.generate([3], SHORT)
            target.before = lambda: None
            gate.open()
            assert [await tokens_of(each) for each in accepted] == [alone([i], SHORT) for i in range(3)]
            assert (await engine.generate([3], SHORT)).token_ids == alone([3], SHORT)

    run(main())


def test_a_request_that_fails_disturbs_no_other() -> None:
    target = Watched()
    target._logits[7] = torch.nan

    async def main() -> None:
        async with AsyncEngine(tabular_engine(target)) as engine:
            params = SamplingParams(seed=1, max_new_tokens=30, logit_bias={7: -100.0})
            good = [engine.generate([i], params) for i in range(3)]
            bad = [engine.generate([7], params), engine.generate([1], temperature=-1), engine.generate([999])]
            done = await asyncio.gather(*good, *bad, return_exceptions=True)
            assert [type(one) for one in done[3:]] == [
                *(errors.NonFiniteLogits, errors.InvalidParameter, errors.TokenOutOfVocabulary)
            ]
            assert [one.token_ids for one in done[:3]] == [  # type: ignore[union-attr]
                tabular_engine().generate([i], params).token_ids for i in range(3)
            ]
            assert engine.status == (0, 0, None, False)

    run(main())


def test_a_step_that_fails_once_ends_no_request() -> None:
    target, gate = Watched(), Gate()
    target.before = gate

    def fail() -> None:
        gate()
        target.before = lambda: None
        raise RuntimeError("broken")

    async def main() -> None:
        async with AsyncEngine(tabular_engine(target, max_batch=2)) as engine:
            running = [await engine.submit([i], LONG) for i in range(2)]
            await reached(gate)
            waiting = await engine.submit([2], LONG)
            target.before = fail
            # The gated step, and the one that fails with both.
            gate.open(2)
            assert [await tokens_of(each) for each in (*running, waiting)] == [alone([i], LONG) for i in range(3)]
            assert engine.status.error is None

    run(main())


@pytest.mark.parametrize("where", ["forward", "calibration"])
def test_steps_that_always_fail_end_every_request(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Watched()
    broken = RuntimeError("broken")

    def fail() -> None:
        raise broken

    async def main() -> None:
        engine = tabular_engine(target, tree="2x1" if where == "forward" else "auto", max_batch=1)
        if where == "forward":
            target.before = fail
        else:
            monkeypatch.setattr(engine, "_calibrate", fail)
        async with AsyncEngine(engine) as served:
            done = await asyncio.gather(*(served.generate([i], SHORT) for i in range(4)), return_exceptions=True)
            named = errors.StepFailed if where == "forward" else errors.RequestInterrupted
            assert [type(one) for one in done] == [named] * 4
            assert {one.__cause__ for one in done} == {broken}  # type: ignore[union-attr]
            assert served.status.error is broken
            target.before = lambda: None
            monkeypatch.undo()
            assert (await served.generate([1], SHORT)).token_ids == alone([1], SHORT)
            assert served.status.error is None

    run(main())


def test_closing_ends_every_request() -> None:
    target, gate = Watched(), Gate()
    target.before = gate

    async def main() -> None:
        engine = AsyncEngine(tabular_engine(target, max_batch=1))
        requests = [await engine.submit([i], LONG) for i in range(3)]
        await reached(gate)
        closing = asyncio.create_task(engine.aclose())
        while not engine.status.closed:
            await asyncio.sleep(0.001)
        with pytest.raises(errors.EngineClosed):
            await engine.submit([4])
        gate.open(9)
        for request in requests:
            assert isinstance(await ends(request.completion()), errors.RequestInterrupted)
        await closing
        await engine.aclose()
        assert engine.status[:2] == (0, 0)

    run(main())


def test_closing_can_wait_for_requests() -> None:
    async def main() -> None:
        engine = AsyncEngine(tabular_engine(max_batch=1))
        requests = [await engine.submit([i], LONG) for i in range(3)]
        await engine.aclose(seconds=LIMIT)
        assert [await tokens_of(each) for each in requests] == [alone([i], LONG) for i in range(3)]

    run(main())


def test_an_interrupt_of_the_main_task_ends_everything() -> None:
    engine = AsyncEngine(tabular_engine())

    async def main() -> None:
        async with engine:
            await engine.submit([1], SamplingParams(max_new_tokens=190))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert engine.status == (0, 0, None, True)


def test_event_loops_of_several_threads_share_an_engine() -> None:
    engine = AsyncEngine(tabular_engine(max_batch=2))

    async def main(start: int) -> list[tuple[int, ...]]:
        done = await asyncio.gather(*(engine.generate([start + i], LONG) for i in range(3)))
        return [one.token_ids for one in done]

    threads = [Thread(lambda start=start: asyncio.run(main(start))) for start in (0, 3)]  # type: ignore[misc]
    found = [text for thread in threads for text in thread.result()]
    assert found == [alone([i], LONG) for i in range(6)]
    # And the engine itself may be used meanwhile.
    assert engine.engine.generate([1], LONG).token_ids == alone([1], LONG)
    run(engine.aclose())


def test_a_loop_that_ends_leaves_no_request_behind() -> None:
    target, gate = Watched(), Gate()
    target.before = gate
    engine = AsyncEngine(tabular_engine(target))

    async def main() -> None:
        await engine.submit([1], LONG)
        await reached(gate)

    run(main())
    target.before = lambda: None
    gate.open()
    wait_for(lambda: engine.status[:2] == (0, 0))
    assert run(engine.generate([1], LONG)).token_ids == alone([1], LONG)


def test_a_slow_reader_neither_stops_others_nor_takes_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "MAX_UNREAD", 3)

    async def main() -> None:
        async with AsyncEngine(tabular_engine()) as engine:
            slow = await engine.submit([1], LONG)
            assert (await engine.generate([2], LONG)).token_ids == alone([2], LONG)
            completion = await slow.completion()
            assert len(slow._chunks) == 3
            chunks = [chunk async for chunk in slow]
            assert tuple(id for chunk in chunks for id in chunk.token_ids) == alone([1], LONG)
            assert sum(chunk.accepted for chunk in chunks) == completion.stats.accepted_tokens
            assert chunks[-1].completion is completion
            assert sum(len(chunk.pieces) for chunk in chunks) == len(completion.token_ids)

    run(main())


def test_the_event_loop_goes_on_while_a_prompt_is_encoded() -> None:
    encoding = threading.Event()

    class SlowTokenizer:
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            assert encoding.wait(LIMIT), "the event loop stands still"
            return {"input_ids": [1]}

        def decode(self, ids: list[int], **options: Any) -> str:
            return "x" * len(ids)

    async def main() -> None:
        async with AsyncEngine(tabular_engine(tokenizer=SlowTokenizer())) as engine:
            task = asyncio.create_task(engine.generate("text", SHORT))
            await asyncio.sleep(0)
            encoding.set()
            assert (await task).text == "xxx"

    run(main())


def test_conversations() -> None:
    class ChatTokenizer:
        chat_template = "{{ messages }}"

        def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> list[int]:
            return [len(message["content"]) for message in messages]

        def decode(self, ids: list[int], **options: Any) -> str:
            return "x" * len(ids)

    messages = [{"role": "user", "content": "abc"}]

    async def main() -> None:
        async with AsyncEngine(tabular_engine(tokenizer=ChatTokenizer())) as engine:
            expected = alone([3], SHORT)
            assert (await engine.chat(messages, SHORT)).token_ids == expected
            assert await tokens_of(await engine.submit_chat(messages, SHORT)) == expected
            chunks = [chunk async for chunk in engine.stream_chat(messages, SHORT, trace=True)]
            assert tuple(id for chunk in chunks for id in chunk.token_ids) == expected
            assert all(chunk.trace is not None for chunk in chunks)
            with pytest.raises(errors.InvalidParameter):
                await engine.chat([{"role": "user"}], SHORT)

    run(main())


def test_an_engine_that_is_no_longer_used_ends_its_thread() -> None:
    engine = AsyncEngine(tabular_engine())
    run(engine.generate([1], SHORT))
    thread = engine._thread._thread
    assert thread is not None
    assert thread.is_alive()
    del engine
    gc.collect()
    wait_for(lambda: not thread.is_alive())


def test_several_completions_of_a_prompt() -> None:
    params = SamplingParams(seed=3, n=3, max_new_tokens=9)

    async def main() -> None:
        async with AsyncEngine(tabular_engine(max_batch=1), max_waiting=2) as engine:
            done = await engine.generate([1], params)
            expected = tabular_engine().generate([1], params)
            assert [one.token_ids for one in done] == [one.token_ids for one in expected]
            with pytest.raises(errors.EngineBusy, match="4 more exceed"):
                await engine.generate([1], n=4)
            with pytest.raises(errors.InvalidParameter, match="n=3"):
                await engine.submit([1], params)
            assert engine.status[:2] == (0, 0)

    run(main())


def test_max_waiting_is_checked() -> None:
    with pytest.raises(errors.InvalidOption, match="max_waiting=-1"):
        AsyncEngine(tabular_engine(), max_waiting=-1)
