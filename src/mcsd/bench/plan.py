"""Who answers what, and when: systems take turns request by request, each time in another order."""

from collections.abc import Mapping
from dataclasses import dataclass

from mcsd.bench.experiment import Experiment, System
from mcsd.errors import InvalidOption


@dataclass(frozen=True)
class Job:
    """One request: a system answers a prompt, or a batch of them together.

    Attributes:
        system: who.
        prompts: the name of the set; numbers: which of its prompts, as many as the batch has.
        temperature, repeat: how, and the how-manieth time.
        seeds: of each prompt; the same for all systems.
    """

    system: System
    prompts: str
    numbers: tuple[int, ...]
    temperature: float
    repeat: int
    seeds: tuple[int, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """Tells it from all others of an experiment."""
        return (self.system.name, self.prompts, self.numbers, self.temperature, self.repeat)


def plan(experiment: Experiment, sizes: Mapping[str, int]) -> list[Job]:
    """All jobs in order. Prompts that fill no batch are left out.

    Args:
        experiment: what is measured.
        sizes: the prompts of each set.

    Raises:
        InvalidOption: a batch is larger than a set.
    """
    jobs: list[Job] = []
    turn = 0
    for repeat in range(experiment.repeats):
        for batch in experiment.batch_sizes:
            for prompts, numbers in _batches(sizes, batch):
                seeds = tuple(_seed(experiment.seed, repeat, number) for number in numbers)
                for temperature in experiment.temperatures:
                    systems = experiment.systems_at(temperature, batch)
                    first = turn % len(systems)
                    turn += 1
                    # Whoever comes first finds another machine than whoever comes last: nobody always does.
                    order = systems[first:] + systems[:first]
                    jobs += [Job(system, prompts, numbers, temperature, repeat, seeds) for system in order]
    return jobs


def _batches(sizes: Mapping[str, int], batch: int) -> list[tuple[str, tuple[int, ...]]]:
    """Batches of all sets, the sets in turn."""
    found = []
    for name, size in sizes.items():
        if batch > size:
            raise InvalidOption(
                f"batches of {batch}, and prompts {name!r:.40} are {size}", "give more prompts or smaller batches"
            )
        starts = range(0, size - batch + 1, batch)
        found += [(place, name, tuple(range(start, start + batch))) for place, start in enumerate(starts)]
    return [(name, numbers) for _, name, numbers in sorted(found, key=lambda entry: entry[0])]


def _seed(seed: int, repeat: int, number: int) -> int:
    return (seed << 24) + (repeat << 12) + number
