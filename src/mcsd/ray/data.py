"""Offline inference through Ray Data: an engine on each of several actors. Extra ``ray``."""

import asyncio
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import fields
from itertools import chain, islice
from typing import Any

from mcsd.async_engine import AsyncEngine
from mcsd.config import EngineOptions
from mcsd.engine import Engine
from mcsd.errors import (
    EngineClosed,
    InvalidOption,
    InvalidParameter,
    MissingPackage,
    RequestError,
    RequestInterrupted,
    check_int,
    check_number,
)
from mcsd.params import SamplingParams
from mcsd.results import Completion

try:
    import pyarrow
    import ray.data

    from mcsd.batch_files import BatchOptions
    from mcsd.batch_files.answers import Answer, answers
    from mcsd.batch_files.lines import Line
    from mcsd.batch_files.run import BatchProgress
    from mcsd.batch_files.run import run_batch as run
except ModuleNotFoundError as error:
    raise MissingPackage(f"Ray needs {error.name}", 'pip install "mcsd[ray]"') from error

RESULTS = ("completion", "token_ids", "finish_reason", "error")
"""The columns that `map_batches` adds."""

_SEGMENT = 1 << 26
"""Bytes of requests that are in the memory of the cluster at once, at most."""


def map_batches(
    dataset: Any,
    *,
    prompt: str = "prompt",
    params: SamplingParams | dict[str, Any] | None = None,
    concurrency: int = 1,
    batch_size: int = 64,
    num_cpus: float = 1,
    num_gpus: float = 0,
    **options: Any,
) -> Any:
    """Complete the prompts of a dataset, on several engines.

    Args:
        dataset: of Ray Data.
        prompt: its column of prompts: texts, token ids, or conversations, which are answered in the chat template.
        params: sampling parameters, as for `mcsd.Engine.generate`.
        concurrency: engines, each in an actor of its own.
        batch_size: prompts that an actor gets at once. Its engine runs ``max_batch`` of them together.
        num_cpus: of each actor; its engine has as many threads.
        num_gpus: of each actor.
        options: arguments of `mcsd.Engine.load`: ``target``, ``draft``, ``tree`` and so on.

    Returns:
        A dataset with the columns of ``dataset``, and ``completion``, ``token_ids`` and ``finish_reason``; or, in
        rows whose request has failed, null and its ``error``.

    Raises:
        InvalidOption, InvalidTree, UnknownScheme, InvalidParameter: an argument; before anything is started.
    """
    known = [one.name for one in fields(EngineOptions)]
    for name in options:
        if name not in known:
            raise InvalidOption(f"{name!r:.40} is not an option", f"one of {', '.join(known)}")
    given = SamplingParams(**params) if isinstance(params, dict) else params
    if given is not None and given.n != 1:
        raise InvalidParameter(f"n={given.n}: a row has one completion", "repeat the rows, or leave n out")
    check_int("batch_size", batch_size, 1, 1 << 20)
    arguments = {"options": EngineOptions(**options), "prompt": prompt, "params": params}
    where = _actors(concurrency, num_cpus, num_gpus)
    return dataset.map_batches(
        _Completer, batch_size=batch_size, batch_format="pyarrow", fn_constructor_kwargs=arguments, **where
    )


def run_batch(
    options: BatchOptions,
    *,
    concurrency: int = 1,
    batch_size: int = 64,
    num_cpus: float = 1,
    num_gpus: float = 0,
    report: Callable[[BatchProgress], None] = lambda progress: None,
) -> BatchProgress:
    """`mcsd.batch_files.run_batch`, on several engines. This process reads the input and writes the output.

    Args:
        options: what is answered, and how; as for ``mcsd batch``, which may go on with the same output.
        concurrency, num_cpus, num_gpus: see `map_batches`.
        batch_size: requests that an actor gets at once. An interruption loses as many for each engine.
        report: called after every answer.

    Raises:
        McsdError: see `mcsd.batch_files.run_batch`.
        ray.exceptions.RayError: an actor cannot load its engine, or cannot go on.
    """
    check_int("batch_size", batch_size, 1, 1 << 20)
    where = _actors(concurrency, num_cpus, num_gpus)

    def source(lines: Iterator[Line]) -> Generator[Answer, None, None]:
        for first in lines:
            blocks = _blocks(chain([first], lines), batch_size)
            dataset = ray.data.from_arrow(blocks).map_batches(
                _Answerer, batch_size=None, batch_format="pyarrow", fn_constructor_args=[options], **where
            )
            dataset.context.execution_options.preserve_order = True
            for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in table.to_pylist():
                    yield Answer(**row)

    return run(options, report=report, source=source)


def _actors(concurrency: int, num_cpus: float, num_gpus: float) -> dict[str, Any]:
    check_int("concurrency", concurrency, 1, 1 << 16)
    check_number("num_cpus", num_cpus, 0, 4096, low_open=True)
    check_number("num_gpus", num_gpus, 0, 64)
    return {"compute": ray.data.ActorPoolStrategy(size=concurrency), "num_cpus": num_cpus, "num_gpus": num_gpus}


def _blocks(lines: Iterator[Line], batch_size: int) -> list[Any]:
    """The next requests as tables of ``batch_size``."""
    tables, size = [], 0
    while size < _SEGMENT and (rows := [line.raw for line in islice(lines, batch_size)]):
        tables.append(pyarrow.table({"raw": rows}))
        size += tables[-1].nbytes
    return tables


class _Answerer:
    """An actor that answers requests of a batch."""

    def __init__(self, options: BatchOptions) -> None:
        self._options = options
        self._engine = Engine.from_options(options.engine)

    def __call__(self, table: Any) -> Any:
        lines = [Line.of(raw, self._options.key) for raw in table.column("raw").to_pylist()]
        found = answers(self._engine, lines, self._options.served_name)
        return pyarrow.Table.from_pylist([answer._asdict() for answer in found])


class _Completer:
    """An actor that completes prompts."""

    def __init__(self, options: EngineOptions, prompt: str, params: Any) -> None:
        self._prompt, self._params = prompt, params
        self._engine = Engine.from_options(options)

    def __call__(self, table: Any) -> Any:
        for name in RESULTS:
            if name in table.column_names:
                raise InvalidOption(f"the dataset has a column {name!r} already", "rename it")
        prompts = table.column(self._prompt).to_pylist()
        results = [_row(one) for one in asyncio.run(self._complete(prompts))]
        types = (pyarrow.string(), pyarrow.list_(pyarrow.int64()), pyarrow.string(), pyarrow.string())
        for name, kind in zip(RESULTS, types, strict=True):
            table = table.append_column(name, pyarrow.array([row[name] for row in results], kind))
        return table

    async def _complete(self, prompts: Iterable[Any]) -> list[Any]:
        """A completion, or an error, for each prompt."""
        async with AsyncEngine(self._engine, max_waiting=1 << 20) as engine:

            async def one(prompt: Any) -> Any:
                prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # An array of a column of tensors.
                if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
                    # In a column all messages have the same fields; those that a message lacks are null.
                    messages = [{k: v for k, v in message.items() if v is not None} for message in prompt]
                    return await engine.chat(messages, self._params)
                return await engine.generate(prompt, self._params)

            return await asyncio.gather(*map(one, prompts), return_exceptions=True)


def _row(done: Completion | BaseException) -> dict[str, Any]:
    if isinstance(done, RequestError) and not isinstance(done, EngineClosed | RequestInterrupted):
        return {**dict.fromkeys(RESULTS), "error": str(done)}
    if isinstance(done, BaseException):
        raise done
    values = done.text, list(done.token_ids), done.finish_reason, None
    return dict(zip(RESULTS, values, strict=True))
