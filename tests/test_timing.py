"""The clock of steps: every second counts for one part, and it waits for the device only when asked."""

import time

import pytest
import torch

from mcsd.timing import PARTS, StepClock

CUDA = torch.device("cuda", 0)


class Card:
    """A device that computes behind the host: the host is busy for as long when it waits."""

    def __init__(self) -> None:
        self.now, self.queued, self.waits = 0.0, 0.0, 0

    def launch(self, seconds: float) -> None:
        self.queued += seconds

    def wait(self, device: torch.device) -> None:
        assert device == CUDA
        self.now += self.queued
        self.queued = 0.0
        self.waits += 1


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    monkeypatch.setattr(time, "perf_counter", lambda: card.now)
    return card


def step(clock: StepClock, card: Card) -> None:
    """Launches a draft of 1 s and a target's forward of 4 s, each in 0.25 s, then reads the result."""
    clock.start()
    for part, seconds in (("draft", 1.0), ("target", 4.0)):
        card.now += 0.25
        card.launch(seconds)
        clock.lap(part)
    card.wait(CUDA)
    clock.lap("judge")


def test_parts_have_their_own_time_if_the_clock_waits(card: Card) -> None:
    clock = StepClock(CUDA, synchronize=True, wait=card.wait)
    card.launch(8.0)  # Work of before the step counts for no part.
    step(clock, card)
    assert clock.seconds == dict.fromkeys(PARTS, 0.0) | {"draft": 1.25, "target": 4.25}
    assert card.waits == 1 + 1 + 3


def test_otherwise_the_clock_never_waits_and_the_sum_is_right(card: Card) -> None:
    clock = StepClock(CUDA, wait=card.wait)
    step(clock, card)
    assert card.waits == 1
    assert clock.seconds == dict.fromkeys(PARTS, 0.0) | {"draft": 0.25, "target": 0.25, "judge": 5.0}
    clock.synchronize = True
    step(clock, card)
    assert clock.seconds["target"] == 0.25 + 4.25


@pytest.mark.parametrize("synchronize", [False, True])
def test_a_cpu_is_never_waited_for(card: Card, synchronize: bool) -> None:
    clock = StepClock(torch.device("cpu"), synchronize, wait=card.wait)
    clock.start()
    card.now += 2.0
    clock.lap("draft")
    card.now += 1.0
    clock.start()
    card.now += 3.0
    clock.lap("draft")
    assert clock.seconds["draft"] == 5.0
    assert card.waits == 0
