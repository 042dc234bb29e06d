"""The training loop: learning-rate schedule, checkpoints, acceptance on held-out text."""

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
from mcsd.files import SAVE_SECONDS, open_tensors, save_tensors

_SAVING, _MEASURING = 0.1, 0.05
"""Maximum fractions of the time for checkpoints, which take long for a large model, and for measuring acceptance."""

_VERSION = 1
"""Format of a checkpoint; one without a version is of version 1."""

_WARM_UP = 0.03
"""Fraction of the budget in which the learning rate rises to its maximum; then it falls linearly to zero."""

_CLIP = 1.0


class Learner(Protocol):
    """A draft in training."""

    @property
    def network(self) -> nn.Module:
        """The trained module."""
        ...

    @property
    def batches_per_step(self) -> int:
        """Batches whose gradients are averaged for one step."""
        ...

    def optimizers(self, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
        """Optimizers with their maximum learning rates; ``dtype`` is that of their matrix products."""
        ...

    def loss(self, batch: Batch) -> Tensor:
        """The training loss."""
        ...

    def draft(self, batch: Batch) -> list[Tensor]:
        """For each step ahead, log-probabilities ``[N, K]`` at the batch's positions."""
        ...


@dataclass(frozen=True)
class Budget:
    """How long to train: ``steps``, or ``seconds`` if that is None."""

    steps: int | None
    seconds: float


@dataclass(frozen=True)
class DraftAcceptance:
    """Acceptance on held-out text, one number for each step ahead.

    Attributes:
        sampled: at temperature 1, the probability that one candidate is accepted: the mean of sum(min(p, q)).
        greedy: at temperature 0, the fraction of positions where the target's argmax is the draft's.
        greedy4: where it is in the draft's top-4.
    """

    sampled: tuple[float, ...]
    greedy: tuple[float, ...]
    greedy4: tuple[float, ...]


@dataclass(frozen=True)
class TrainingReport:
    """The state of training.

    Attributes:
        share: used fraction of the budget.
        step: steps done; seconds: of training, over all runs.
        loss: mean since the last report; None if no step was left to do.
        acceptance: on held-out text.
    """

    share: float
    step: int
    seconds: float
    loss: float | None
    acceptance: DraftAcceptance


def train(
    learner: Learner,
    batches: Batches,
    held_out: Batch,
    teacher: Teacher,
    budget: Budget,
    checkpoint: Path,
    dtype: torch.dtype,
    progress: Callable[[TrainingReport], None],
) -> TrainingReport:
    """Train until the budget is used, starting from the checkpoint if there is one.

    Args:
        learner: is trained in place.
        batches: training batches.
        held_out: the batch that acceptance is measured on, on the teacher's device.
        teacher: the target, for the held-out batch.
        budget: in steps or seconds.
        checkpoint: a file, written twice a minute, or less often if that takes long.
        dtype: of matrix products; weights and sums are float32 in any case.
        progress: called twice a minute, or less often if measuring acceptance takes long.

    Returns:
        The last report.

    Raises:
        OutputFailed, WeightsCorrupt: the checkpoint cannot be written or read.
    """
    optimizers = learner.optimizers(dtype)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    step, seconds = restore_checkpoint(checkpoint, batches.texts, learner.network, optimizers)
    target = teacher.distribution(held_out)
    autocast = torch.autocast(teacher.device.type, dtype, enabled=dtype != torch.float32)

    def measured() -> DraftAcceptance:
        with autocast:
            return acceptance(learner, held_out, target, teacher.vocabulary)

    losses: list[float] = []
    saving, measuring = _Interval(_SAVING), _Interval(_MEASURING)
    start = time.monotonic() - seconds
    report: TrainingReport | None = None
    while (share := _share(budget, step, seconds)) < 1:
        _set_learning_rates(optimizers, rates, share)
        losses += _accumulate_gradients(learner, batches, step, teacher.device, autocast)
        _optimizer_step(learner.network, optimizers)
        step, seconds = step + 1, time.monotonic() - start
        done = _share(budget, step, seconds) >= 1
        if done or saving.due():
            with saving:
                save_checkpoint(checkpoint, batches.texts, learner.network, optimizers, step, seconds)
        if done or measuring.due():
            with measuring:
                accepted = measured()
            report = TrainingReport(_share(budget, step, seconds), step, seconds, sum(losses) / len(losses), accepted)
            losses.clear()
            progress(report)
    return report or TrainingReport(1.0, step, seconds, None, measured())


def _set_learning_rates(
    optimizers: Sequence[torch.optim.Optimizer], rates: Sequence[Sequence[float]], share: float
) -> None:
    """Set the learning rates for a used fraction of the budget; ``rates`` are the maxima, by optimizer and group."""
    rate = min(1.0, max(share, 1e-3) / _WARM_UP) * (1 - share)
    for optimizer, full in zip(optimizers, rates, strict=True):
        for group, lr in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = lr * rate


def _accumulate_gradients(
    learner: Learner, batches: Batches, step: int, device: torch.device, autocast: AbstractContextManager[Any]
) -> list[float]:
    """Backpropagate the mean loss of a step's batches; returns their losses."""
    losses = []
    for index in range(learner.batches_per_step):
        batch = batches[step * learner.batches_per_step + index].to(device)
        with autocast:
            loss = learner.loss(batch)
        (loss / learner.batches_per_step).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
    return losses


def _optimizer_step(network: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    nn.utils.clip_grad_norm_(network.parameters(), _CLIP)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


class _Interval:
    """When a task is due again: twice a minute, or less often if it would take more than ``share`` of the time."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._ended = time.monotonic()
        self._pause = SAVE_SECONDS

    def due(self) -> bool:
        """Whether the task is due."""
        return time.monotonic() - self._ended > self._pause

    def __enter__(self) -> None:
        self._begun = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._ended = time.monotonic()
        self._pause = max(SAVE_SECONDS, (self._ended - self._begun) / self._share)


def _share(budget: Budget, step: int, seconds: float) -> float:
    return seconds / budget.seconds if budget.steps is None else step / budget.steps


@torch.no_grad()
def acceptance(learner: Learner, held_out: Batch, target: tuple[Tensor, Tensor], vocabulary: Tensor) -> DraftAcceptance:
    """Measure on held-out text, given its `Teacher.distribution` and the draft vocabulary."""
    p, argmax = target
    sampled, greedy, greedy4 = [], [], []
    for draft in learner.draft(held_out):
        sampled.append(torch.minimum(p, draft.exp()).sum(-1).mean().item())
        correct = vocabulary[draft.topk(min(4, draft.shape[-1]), dim=-1).indices] == argmax[:, None]
        greedy.append(correct[:, 0].float().mean().item())
        greedy4.append(correct.any(-1).float().mean().item())
    return DraftAcceptance(tuple(sampled), tuple(greedy), tuple(greedy4))


def save_checkpoint(
    path: Path, texts: str, network: nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int, seconds: float
) -> None:
    """Write a checkpoint: weights, optimizer states, steps and seconds.

    Args:
        texts: names the training text, which a run must be resumed with.
    """
    tensors = {f"network.{name}": tensor for name, tensor in _trained_parameters(network).items()}
    for number, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{parameter}.{name}": tensor for name, tensor in state.items()}
    metadata = {"version": str(_VERSION), "texts": texts, "step": str(step), "seconds": str(seconds)}
    save_tensors(path, tensors, metadata)


def restore_checkpoint(
    path: Path, texts: str, network: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[int, float]:
    """Load a checkpoint into network and optimizers.

    Returns:
        Steps and seconds of training so far; zeros if there is no checkpoint.
    """
    if not path.exists():
        return 0, 0.0
    with open_tensors(path) as file:
        metadata: Mapping[str, str] = file.metadata() or {}
        if (version := metadata.get("version", "1")) != str(_VERSION):
            raise ValueError(f"format version {version:.40}; this mcsd reads version {_VERSION}")
        # The draft vocabulary and the scale of hidden states follow from the text.
        if metadata.get("texts", texts) != texts:
            raise ValueError("the training text has changed")
        states: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
        weights: dict[str, Tensor] = {}
        for key in file.keys():  # noqa: SIM118 (not a dict)
            kind, _, rest = key.partition(".")
            if kind == "network":
                weights[rest] = file.get_tensor(key)
            else:
                number, parameter, name = rest.split(".")
                states[int(number)].setdefault(int(parameter), {})[name] = file.get_tensor(key).clone()
        if weights.keys() != _trained_parameters(network).keys():
            raise ValueError("it has other weights")
        network.load_state_dict(weights, strict=False)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(metadata["step"]), float(metadata["seconds"])


def _trained_parameters(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in network.named_parameters() if parameter.requires_grad}
