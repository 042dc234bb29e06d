"""CUDA graphs: functions of tensors that are captured once and then replayed as one launch.

At batch 1 the host needs more time to launch the kernels of a step than the card needs to run them. A replay costs the
host one launch. It runs no Python code: what the host keeps track of is up to the caller.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from mcsd.errors import McsdWarning

MAX_GRAPHS = 64
"""Graphs that a `GraphCache` keeps; the one that was not used for the longest time makes space for a new one."""

MAX_BYTES = 1 << 31
"""Memory that its graphs may take on the device, their outputs included; beyond it functions run without a graph."""

Outputs = tuple[Any, ...]
"""Tensors, or None."""


class TensorGroup(Protocol):
    """An argument of a captured function that consists of several tensors and of data that its key covers."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors."""
        ...

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """The same with other tensors of the same shapes."""
        ...


class GraphStats(NamedTuple):
    """What a `GraphCache` holds.

    Attributes:
        graphs: how many.
        bytes: device memory that their captures have taken.
    """

    graphs: int
    bytes: int


_outputs: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
"""Outputs of all captured functions, by `id`. Their address never changes, so another graph reads them in place."""


def _is_output(tensor: Tensor) -> bool:
    return _outputs.get(id(tensor)) is tensor


class GraphCache:
    """Runs functions of tensors. One that is used a second time is captured, and replayed from then on.

    A function must depend on its arguments and its key only, and on tensors whose address the key covers. It must not
    wait for the device nor send anything to it. Its outputs hold until it is called again.

    Args:
        device: where the functions compute.
        enabled: whether to capture anything; on a CPU nothing is captured.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self._device = device
        self._enabled = enabled and device.type == "cuda"
        self._seen: set[Hashable] = set()
        self._captured: OrderedDict[Hashable, _CapturedFunction] = OrderedDict()
        self._bytes = 0

    @property
    def stats(self) -> GraphStats:
        """What it holds."""
        return GraphStats(len(self._captured), self._bytes)

    def run(self, key: Hashable, function: Callable[..., Outputs], *arguments: Any) -> Outputs:
        """The outputs of a function.

        Args:
            key: identifies the function and all that it depends on besides its arguments. Shapes and dtypes of the
                arguments need not be in it.
            function: from arguments like the given ones to tensors.
            arguments: tensors, or a `TensorGroup` each.
        """
        if not self._enabled:
            return function(*arguments)
        tensors = [tensor for argument in arguments for tensor in _tensors(argument)]
        key = key, *(id(each) if _is_output(each) else (each.shape, each.dtype) for each in tensors)
        captured = self._captured.get(key)
        if captured is None:
            if key not in self._seen or self._bytes > MAX_BYTES:
                # Shapes that occur once are not worth a graph. This run also compiles kernels and makes constants.
                self._seen.add(key)
                return function(*arguments)
            captured = self._capture(function, arguments, tensors)
            if captured is None:
                return function(*arguments)
            self._captured[key] = captured
            if len(self._captured) > MAX_GRAPHS:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        return captured(tensors)

    def _capture(
        self, function: Callable[..., Outputs], arguments: Sequence[Any], tensors: list[Tensor]
    ) -> "_CapturedFunction | None":
        before = _reserved_bytes(self._device)
        try:
            captured = _CapturedFunction(function, arguments, tensors)
        except RuntimeError as error:
            reason = (str(error).splitlines() or ["unknown"])[0]
            message = f"runs without CUDA graphs, which this model does not allow: {reason:.100}"
            warnings.warn(message, McsdWarning, stacklevel=4)
            self._enabled = False
            return None
        self._bytes += max(0, _reserved_bytes(self._device) - before)
        return captured


class _CapturedFunction:
    """A function with arguments at fixed addresses."""

    def __init__(self, function: Callable[..., Outputs], arguments: Sequence[Any], tensors: list[Tensor]) -> None:
        self._inputs = [each if _is_output(each) else each.clone() for each in tensors]
        self._given = tensors
        self._versions = [_version(each) for each in tensors]
        rest = iter(self._inputs)
        static = [
            next(rest)
            if isinstance(argument, Tensor)
            else argument.with_tensors([next(rest) for _ in argument.tensors])
            for argument in arguments
        ]
        outputs, self._replay = record(lambda: function(*static))
        self._outputs = outputs
        _outputs.update({id(each): each for each in outputs if each is not None})

    def __call__(self, tensors: list[Tensor]) -> Outputs:
        """Replay with the values of these tensors."""
        # Most inputs are those of the last call, and have not been written since.
        changed = [
            index
            for index, (given, last, version) in enumerate(zip(tensors, self._given, self._versions, strict=True))
            if (given is not last or version is None or _version(given) != version) and given is not self._inputs[index]
        ]
        if changed:
            torch._foreach_copy_([self._inputs[index] for index in changed], [tensors[index] for index in changed])
            self._given, self._versions = tensors, [_version(each) for each in tensors]
        self._replay()
        return self._outputs


def record(function: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
    """Capture the kernels of a function without running them: its outputs, and what runs them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function()
    return outputs, graph.replay


def _tensors(argument: Tensor | TensorGroup) -> tuple[Tensor, ...]:
    return (argument,) if isinstance(argument, Tensor) else argument.tensors


def _version(tensor: Tensor) -> int | None:
    """Grows with every write to a tensor; None if it is not counted."""
    return None if tensor.is_inference() else tensor._version


def _reserved_bytes(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device)
