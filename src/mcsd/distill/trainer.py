"""The training loop: a schedule, checkpoints, acceptance on text that is held out."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mcsd.distill.batches import Batch, Batches
from mcsd.distill.teacher import Teacher
from mcsd.files import SAVE_SECONDS, save_tensors, tensors_of

_SAVING, _MEASURING = 0.1, 0.05
"""The most of the time that goes into checkpoints (of a large model they take long), and into measuring acceptance."""

_WARM_UP = 0.03
"""Share of the budget in which the learning rate rises to its full size; it falls linearly to zero from there."""

_CLIP = 1.0


class Learner(Protocol):
    """A draft in training."""

    @property
    def network(self) -> nn.Module:
        """What is trained."""
        ...

    @property
    def batches(self) -> int:
        """Batches whose mean gradient makes a step."""
        ...

    def optimizers(self, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
        """One for each kind of parameter, at its full learning rate; ``dtype`` is that of their products."""
        ...

    def loss(self, batch: Batch) -> Tensor:
        """What to make small."""
        ...

    def draft(self, batch: Batch) -> list[Tensor]:
        """For each step ahead, log-probabilities ``[N, K]`` at the batch's positions."""
        ...


@dataclass(frozen=True)
class Budget:
    """How long to train: ``steps``, or ``seconds`` where it is None."""

    steps: int | None
    seconds: float


@dataclass(frozen=True)
class Acceptance:
    """On held-out text, a number for each step ahead.

    Attributes:
        sampled: at temperature 1, the chance that one candidate is accepted: the mean of sum(min(p, q)).
        greedy: at temperature 0, the share of positions where the target's token is the draft's first.
        greedy4: where it is among the draft's first four.
    """

    sampled: tuple[float, ...]
    greedy: tuple[float, ...]
    greedy4: tuple[float, ...]


@dataclass(frozen=True)
class Report:
    """Where training stands.

    Attributes:
        share: of the budget that is used.
        step: steps done; seconds: of training, over all sittings.
        loss: mean since the last report; None where no step was left to do.
        acceptance: on held-out text.
    """

    share: float
    step: int
    seconds: float
    loss: float | None
    acceptance: Acceptance


def train(
    learner: Learner,
    batches: Batches,
    held_out: Batch,
    teacher: Teacher,
    budget: Budget,
    checkpoint: Path,
    dtype: torch.dtype,
    progress: Callable[[Report], None],
) -> Report:
    """Train until the budget is used, from the checkpoint on if there is one.

    Args:
        learner: is trained in place.
        batches: what the steps read.
        held_out: what acceptance is measured on.
        teacher: of the held-out text.
        budget: in steps or seconds.
        checkpoint: a file; written twice a minute, or less often where that takes long.
        dtype: of the products; weights and sums are float32 in any case.
        progress: told as often, or less often where measuring acceptance takes long.

    Returns:
        The last report.

    Raises:
        OutputFailed, WeightsCorrupt: the checkpoint cannot be written or read.
    """
    held_out = held_out.to(teacher.device)
    optimizers = learner.optimizers(dtype)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    step, seconds = restore(checkpoint, learner.network, optimizers)
    law = teacher.law(held_out)
    mixed = torch.autocast(teacher.device.type, dtype, enabled=dtype != torch.float32)

    def measured() -> Acceptance:
        with mixed:
            return acceptance(learner, held_out, law, teacher.vocabulary)

    losses: list[float] = []
    saving, measuring = _Rhythm(_SAVING), _Rhythm(_MEASURING)
    start = time.monotonic() - seconds
    report: Report | None = None
    while (share := _share(budget, step, seconds)) < 1:
        _schedule(optimizers, rates, share)
        losses += _gradient(learner, batches, step, teacher.device, mixed)
        _descend(learner.network, optimizers)
        step, seconds = step + 1, time.monotonic() - start
        done = _share(budget, step, seconds) >= 1
        if done or saving.due():
            with saving:
                save(checkpoint, learner.network, optimizers, step, seconds)
        if done or measuring.due():
            with measuring:
                accepted = measured()
            report = Report(_share(budget, step, seconds), step, seconds, sum(losses) / len(losses), accepted)
            losses.clear()
            progress(report)
    return report or Report(1.0, step, seconds, None, measured())


def _schedule(optimizers: Sequence[torch.optim.Optimizer], rates: Sequence[Sequence[float]], share: float) -> None:
    """Set the learning rates for where the budget stands; ``rates`` are the full ones, by optimizer and group."""
    rate = min(1.0, max(share, 1e-3) / _WARM_UP) * (1 - share)
    for optimizer, full in zip(optimizers, rates, strict=True):
        for group, lr in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = lr * rate


def _gradient(
    learner: Learner, batches: Batches, step: int, device: torch.device, mixed: AbstractContextManager[Any]
) -> list[float]:
    """The mean gradient of a step's batches; returns their losses."""
    losses = []
    for place in range(learner.batches):
        with mixed:
            loss = learner.loss(batches[step * learner.batches + place].to(device))
        (loss / learner.batches).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
    return losses


def _descend(network: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    nn.utils.clip_grad_norm_(network.parameters(), _CLIP)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


class _Rhythm:
    """When to do again what takes time: twice a minute, or less often where that would take more than ``share``."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._ended = time.monotonic()
        self._pause = SAVE_SECONDS

    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() - self._ended > self._pause

    def __enter__(self) -> None:
        self._begun = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._ended = time.monotonic()
        self._pause = max(SAVE_SECONDS, (self._ended - self._begun) / self._share)


def _share(budget: Budget, step: int, seconds: float) -> float:
    return seconds / budget.seconds if budget.steps is None else step / budget.steps


@torch.no_grad()
def acceptance(learner: Learner, held_out: Batch, law: tuple[Tensor, Tensor], vocabulary: Tensor) -> Acceptance:
    """Measure on held-out text; ``law`` is the teacher's `Teacher.law` of it, ``vocabulary`` its tokens that count."""
    p, best = law
    sampled, greedy, greedy4 = [], [], []
    for draft in learner.draft(held_out):
        sampled.append(torch.minimum(p, draft.exp()).sum(-1).mean().item())
        first = vocabulary[draft.topk(min(4, draft.shape[-1]), dim=-1).indices] == best[:, None]
        greedy.append(first[:, 0].float().mean().item())
        greedy4.append(first.any(-1).float().mean().item())
    return Acceptance(tuple(sampled), tuple(greedy), tuple(greedy4))


def save(
    path: Path, network: nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int, seconds: float
) -> None:
    """Write a checkpoint: weights, the optimizers' states, where training stands."""
    tensors = {f"network.{name}": tensor for name, tensor in _trained(network).items()}
    for number, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{parameter}.{name}": tensor for name, tensor in state.items()}
    save_tensors(path, tensors, {"step": str(step), "seconds": str(seconds)})


def restore(path: Path, network: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[int, float]:
    """Read a checkpoint into network and optimizers.

    Returns:
        Steps and seconds of training so far; zeros if there is no checkpoint.
    """
    if not path.exists():
        return 0, 0.0
    with tensors_of(path) as file:
        metadata: Mapping[str, str] = file.metadata()
        states: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
        weights: dict[str, Tensor] = {}
        for key in file.keys():  # noqa: SIM118 (not a dict)
            kind, _, rest = key.partition(".")
            if kind == "network":
                weights[rest] = file.get_tensor(key)
            else:
                number, parameter, name = rest.split(".")
                states[int(number)].setdefault(int(parameter), {})[name] = file.get_tensor(key).clone()
        if weights.keys() != _trained(network).keys():
            raise ValueError("it holds other weights")
        network.load_state_dict(weights, strict=False)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(metadata["step"]), float(metadata["seconds"])


def _trained(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in network.named_parameters() if parameter.requires_grad}
