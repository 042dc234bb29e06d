"""A stand-in for a CUDA graph: the operations of a function, recorded once and repeated on the same tensors.

Like a graph it runs no Python code when it is replayed, so whatever the host has put into an operation (a length, a
slice, a branch) stays as it was. Recording leaves all tensors as they were, as capturing runs nothing. A function that
waits for the device or sends something to it cannot be recorded.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support import simulated_cuda
from support.simulated_cuda import recording


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        """Operation, arguments, and the new tensors that it returns."""
        self.overwritten: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        for argument, value in zip(schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.overwritten += [(each, each.clone()) for each in tree_leaves(value) if isinstance(each, Tensor)]
        out = func(*args, **kwargs)
        is_new = all(each.alias_info is None for each in schema.returns)
        is_view = not is_new and not schema.is_mutable
        if not is_view:
            fresh = [each for each in tree_leaves(out) if isinstance(each, Tensor)] if is_new else []
            self.calls.append((func, args, kwargs, fresh))
        return out


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """What `mcsd.graphs.waits_are_errors` does on a card, but at the end.

    Raises:
        RuntimeError: the host has waited for the device or sent something to it.
    """
    outer, simulated_cuda._counts = simulated_cuda._counts, None
    try:
        with recording() as counts:
            yield
    finally:
        simulated_cuda._counts = outer
    if counts.reads or counts.copies:
        raise RuntimeError(f"called a synchronizing operation: {dict(counts.reads + counts.copies)}")


def record(function: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
    """What `mcsd.graphs.record` does on a card.

    Raises:
        RuntimeError: the function waits for the device or sends something to it.
    """
    with waits_are_errors(), _Recorder() as recorder:
        outputs = function()
    outer, simulated_cuda._counts = simulated_cuda._counts, None
    for tensor, before in reversed(recorder.overwritten):
        tensor.copy_(before)
    simulated_cuda._counts = outer

    def replay() -> None:
        outer, simulated_cuda._counts = simulated_cuda._counts, None
        if outer is not None:
            outer.launches["graph"] += 1
        try:
            for func, args, kwargs, fresh in recorder.calls:
                out = func(*args, **kwargs)
                new = [each for each in tree_leaves(out) if isinstance(each, Tensor)] if fresh else []
                for old, value in zip(fresh, new, strict=True):
                    old.copy_(value)
        finally:
            simulated_cuda._counts = outer

    return outputs, replay
