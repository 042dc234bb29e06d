"""A simulated GPU: tensors that lie in the memory of the CPU and say that they are on a CUDA device.

Within `SimulatedCuda` it records, by line of the source, what a CUDA device would make expensive or wrong:

- reads: the host asks for numbers (``tolist``, ``item``, a boolean index) and waits for all work before;
- copies: the host sends numbers (``torch.tensor(..., device=...)``, a list as an index) and waits likewise;
- mixed: an operation has tensors of both devices;
- launches: operations that start at least one kernel, by name.

It knows nothing of times.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 7)
"""An index that no machine has: tensors that are cached by device never meet a real one."""

_READS = {
    *("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__"),
    *("nonzero", "argwhere", "unique", "masked_select", "bincount", "equal", "allclose", "is_nonzero"),
}
_TO_HOST = {"cpu", "numpy", "tolist", "item"}
_SENDS = {"tensor", "as_tensor", "from_numpy"}
_MAY_MIX = {"__getitem__", "__setitem__", "copy_", "to", "index_put", "index_put_", "__get__", "__set__"}

_NO_KERNEL = {
    *("view", "_unsafe_view", "_reshape_alias", "expand", "slice", "select", "unsqueeze", "squeeze", "transpose", "t"),
    *("permute", "split", "split_with_sizes", "chunk", "unbind", "narrow", "detach", "alias", "as_strided", "unfold"),
    *("diagonal", "lift", "lift_fresh", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
    *("_local_scalar_dense", "item", "set_", "resize_", "is_same_size", "_to_copy", "scalar_tensor"),
}


@dataclass
class Counts:
    """What was recorded, by line of the source or name of the operation."""

    reads: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    mixed: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)


_counts: Counts | None = None
"""Where to record; None outside of `recording`."""


class SimulatedTensor(torch.Tensor):
    """A tensor that says that it is on `DEVICE`."""

    @staticmethod
    def __new__(cls, data: Tensor) -> "SimulatedTensor":
        return torch.Tensor._make_subclass(cls, data, data.requires_grad)

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = SimulatedTensor(self.detach().as_subclass(Tensor).clone())
        return nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        return _call(func, args, dict(kwargs or {}))


class SimulatedCuda(TorchFunctionMode):
    """A context in which `DEVICE` exists."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        return _call(func, args, dict(kwargs or {}))


class _Launches(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        if _counts is not None:
            name = func._schema.name.partition("::")[2]
            if name not in _NO_KERNEL:
                # Copies of tensors of several dtypes are a launch each.
                _counts.launches[name] += len(args[0]) if name == "_foreach_copy_" else 1
        return func(*args, **(kwargs or {}))


class recording:  # noqa: N801 (a context manager)
    """Record what happens in a block."""

    def __enter__(self) -> Counts:
        global _counts
        assert _counts is None
        _counts = Counts()
        self._launches = _Launches()
        self._launches.__enter__()
        return _counts

    def __exit__(self, *error: Any) -> None:
        global _counts
        self._launches.__exit__(*error)
        _counts = None


def simulated(data: Tensor) -> Tensor:
    """A tensor on the simulated device."""
    return SimulatedTensor(data)


def move(module: Any) -> Any:
    """Move a module to the simulated device, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(SimulatedTensor(parameter.detach()), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = SimulatedTensor(buffer)
    return module


def _call(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a function of torch on the CPU and record what it would do on the device."""
    name = getattr(func, "__name__", str(func))
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_device = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    if name == "to":
        return _to(func, args, kwargs)
    is_factory = _is_simulated(kwargs.get("device"))
    if is_factory:
        kwargs["device"] = "cpu"
        if name in _SENDS and not on_device:
            _record("copies")
    if on_device:
        _record_operation(
            name,
            args,
            len(tensors) > len(on_device)
            and any(not isinstance(tensor, SimulatedTensor) and tensor.dim() for tensor in tensors),
        )
    with torch._C.DisableTorchFunctionSubclass():
        if name in _TO_HOST:
            args = tree_map(_plain, args)
        out = func(*args, **kwargs)
    if name in _TO_HOST:
        return tree_map(_plain, out)
    return tree_map(_wrapped, out) if on_device or is_factory else out


def _to(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``tensor.to(...)``, the one function that moves a tensor from device to device."""
    tensor, *rest = args
    named = [each for each in rest if isinstance(each, torch.device | str)]
    target = kwargs.pop("device", named[0] if named else None)
    rest = [each for each in rest if isinstance(each, torch.dtype | Tensor)]
    if rest and isinstance(rest[0], Tensor):
        # The dtype and device of another tensor.
        target, rest[0] = rest[0].device, rest[0].dtype
    before = isinstance(tensor, SimulatedTensor)
    after = before if target is None else _is_simulated(target)
    if after != before:
        _record("copies" if after else "reads")
    out = _plain(tensor)
    if rest or kwargs:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(out, *rest, **kwargs)
    if after == before and out is tensor:
        return tensor
    return SimulatedTensor(out) if after else out


def _record_operation(name: str, args: Any, is_mixed: bool) -> None:
    if is_mixed and name not in _MAY_MIX:
        _record("mixed")
    if name in _READS:
        _record("reads")
    elif name in ("__getitem__", "__setitem__"):
        value = args[2] if name == "__setitem__" else None
        for index in args[1] if isinstance(args[1], tuple) else (args[1],):
            if isinstance(index, list | range) or (_is_plain(index) and index.dim()):
                _record("copies")
            elif isinstance(index, Tensor) and index.dtype == torch.bool and (value is None or _has_entries(value)):
                _record("reads")
        if _is_plain(value) and value.dim():
            _record("copies")
    elif name == "copy_" and isinstance(args[0], SimulatedTensor) != isinstance(args[1], SimulatedTensor):
        _record("copies" if isinstance(args[0], SimulatedTensor) else "reads")
    elif name == "repeat_interleave" and len(args) > 1 and isinstance(args[1], Tensor):
        _record("reads")


def _record(kind: str) -> None:
    if _counts is not None:
        getattr(_counts, kind)[_line()] += 1


def _line() -> str:
    """The line of mcsd, or else of another package, that called torch."""
    frame = sys._getframe(1)
    other = ""
    while frame is not None:
        path = frame.f_code.co_filename
        if "/mcsd/" in path:
            return f"{path.rpartition('/mcsd/')[2]}:{frame.f_lineno}"
        if not other and "/torch/" not in path and not path.endswith("simulated_cuda.py"):
            other = f"{path}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return other


def _is_simulated(device: Any) -> bool:
    return device is not None and torch.device(device) == DEVICE


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, SimulatedTensor)


def _has_entries(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 1


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, SimulatedTensor) else value


def _wrapped(value: Any) -> Any:
    return SimulatedTensor(value) if type(value) is Tensor else value
