"""CUDA graphs: functions of tensors that are captured once and then replayed as one launch.

At batch 1 the host needs more time to launch the kernels of a step than the card needs to run them. A replay costs the
host one launch. It runs no Python code: what the host keeps track of is up to the caller.
"""

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mcsd.errors import McsdWarning

MAX_GRAPHS = 64
"""Graphs that a `GraphCache` keeps at most."""

MAX_BYTES = 1 << 31
"""Memory that its graphs may take on the device, their outputs included."""

_EAGER_RUNS = 2
"""Runs of a function before it is captured. The first compiles kernels and makes constants; the second must not wait
for the device, which a failed capture would leave in a bad state."""

Outputs = tuple[Any, ...]
"""Tensors, or None."""

_capturing = Lock()


class TensorGroup(Protocol):
    """An argument of a captured function: several tensors, and other data that the key covers."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors."""
        ...

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """A copy with other tensors of the same shapes."""
        ...


class GraphStats(NamedTuple):
    """Number and memory of the graphs of a `GraphCache`.

    Attributes:
        graphs: how many.
        bytes: device memory that their captures have taken.
    """

    graphs: int
    bytes: int


class GraphCache:
    """Runs functions of tensors. One that is used again is captured, and replayed from then on.

    A function must depend on its arguments and its key only. It may read and write tensors at addresses that stay the
    same in a generation. It must not wait for the device nor send anything to it. Its outputs hold until its next call.

    Args:
        device: where the functions compute.
        enabled: whether to capture anything; on a CPU nothing is captured.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self._device = device
        self._enabled = enabled and device.type == "cuda"
        self._runs: Counter[Hashable] = Counter()
        self._captured: OrderedDict[Hashable, _CapturedFunction] = OrderedDict()
        self._generation = 0

    @property
    def stats(self) -> GraphStats:
        """Number and memory of the graphs."""
        return GraphStats(len(self._captured), sum(each.bytes for each in self._captured.values()))

    def run(
        self, key: Hashable, function: Callable[..., Outputs], *arguments: Any, generation: int | None = None
    ) -> Outputs:
        """The outputs of a function.

        Args:
            key: identifies the function and all that it depends on besides its arguments. Shapes and dtypes of the
                arguments need not be in it.
            function: from arguments like the given ones to tensors.
            arguments: tensors, or a `TensorGroup` each.
            generation: of the addresses that functions read and write. A new one ends all graphs.
        """
        if not self._enabled:
            return function(*arguments)
        if generation is not None and generation != self._generation:
            self._clear()
            self._generation = generation
        tensors = [tensor for argument in arguments for tensor in _tensors(argument)]
        full_key = key, *((each.shape, each.dtype) for each in tensors)
        captured = self._captured.get(full_key)
        if captured is None:
            runs = self._runs[full_key]
            # Shapes that occur once or twice are not worth a graph.
            if runs < _EAGER_RUNS:
                outputs = function(*arguments) if not runs else self._checked(function, arguments)
                self._runs[full_key] += 1
                return outputs
            captured = self._captured[full_key] = _CapturedFunction(function, arguments, tensors, self._device)
            while len(self._captured) > MAX_GRAPHS or (len(self._captured) > 1 and self.stats.bytes > MAX_BYTES):
                self._captured.popitem(last=False)
        self._captured.move_to_end(full_key)
        return captured(tensors)

    def _checked(self, function: Callable[..., Outputs], arguments: Sequence[Any]) -> Outputs:
        """The outputs of a function. If it waits for the device, nothing is captured from now on."""
        try:
            with waits_are_errors():
                return function(*arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error).splitlines() or ["unknown"])[0]
            warnings.warn(f"no CUDA graphs are used, because a forward waits: {reason:.100}", McsdWarning, stacklevel=4)
            self._enabled = False
            self._clear()
            return function(*arguments)

    def _clear(self) -> None:
        self._captured.clear()
        self._runs.clear()


class _CapturedFunction:
    """A function with arguments at fixed addresses.

    Attributes:
        bytes: device memory that its capture has taken.
    """

    def __init__(
        self, function: Callable[..., Outputs], arguments: Sequence[Any], tensors: list[Tensor], device: torch.device
    ) -> None:
        self._inputs = [each.clone() for each in tensors]
        self._given = tensors
        self._versions = [_version(each) for each in tensors]
        rest = iter(self._inputs)
        static = [
            next(rest) if isinstance(each, Tensor) else each.with_tensors([next(rest) for _ in each.tensors])
            for each in arguments
        ]
        before = _reserved_bytes(device)
        with ReadTensors() as self._read:
            self._outputs, self._replay = record(lambda: function(*static), device)
        self.bytes = max(0, _reserved_bytes(device) - before)

    def __call__(self, tensors: list[Tensor]) -> Outputs:
        """Replay with the values of these tensors."""
        # Many inputs are those of the last call, and have not been written since.
        changed = [
            index
            for index, (given, last, version) in enumerate(zip(tensors, self._given, self._versions, strict=True))
            if given is not last or version is None or _version(given) != version
        ]
        if changed:
            torch._foreach_copy_([self._inputs[index] for index in changed], [tensors[index] for index in changed])
            self._given, self._versions = tensors, [_version(each) for each in tensors]
        self._replay()
        return self._outputs


class ReadTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the memory that a function reads and has not made itself, such as constants: a graph knows its address."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept: dict[int, Any] = {}
        self._made: set[int] = set()

    @property
    def addresses(self) -> set[int]:
        """Where the memory is."""
        return set(self._kept)

    def __torch_dispatch__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        kwargs = kwargs or {}
        for storage in _storages((*args, *kwargs.values())):
            if storage.data_ptr() not in self._made:
                self._kept[storage.data_ptr()] = storage
        out = func(*args, **kwargs)
        for storage in _storages(out if isinstance(out, tuple | list) else (out,)):
            if storage.data_ptr() not in self._kept:
                self._made.add(storage.data_ptr())
        return out


def record(function: Callable[[], Outputs], device: torch.device) -> tuple[Outputs, Callable[[], None]]:
    """Capture the kernels of a function without running them: its outputs, and what runs them."""
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream(device)
    with (
        _capturing,
        torch.cuda.stream(stream),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        outputs = function()
    return outputs, graph.replay


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """In this context torch raises RuntimeError when the host waits for a CUDA device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def on_host(argument: Any) -> Any:
    """A tensor, or a `TensorGroup`, on the CPU."""
    if isinstance(argument, Tensor):
        return argument.cpu()
    return argument.with_tensors([tensor.cpu() for tensor in argument.tensors])


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _tensors(argument: Any) -> tuple[Tensor, ...]:
    return (argument,) if isinstance(argument, Tensor) else argument.tensors


def _storages(values: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
    """The memory of tensors, some of them in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value.untyped_storage()
        elif isinstance(value, tuple | list):
            yield from _storages(value)


def _version(tensor: Tensor) -> int | None:
    """Grows with every write to a tensor; None if it is not counted."""
    return None if tensor.is_inference() else tensor._version


def _reserved_bytes(device: torch.device) -> int:
    """Device memory of torch without what it has freed."""
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)
