"""The order of requests: systems are interleaved request by request, each time starting with another one."""

from collections.abc import Mapping
from dataclasses import dataclass

from mcsd.bench.experiment import Experiment, System
from mcsd.errors import InvalidOption


@dataclass(frozen=True)
class BenchJob:
    """A prompt, or a batch of prompts, for one system.

    Attributes:
        system: that answers.
        prompts: the name of the prompt set; numbers: indices of its prompts, one for each sequence of the batch.
        temperature: of sampling; repeat: index of the repeat.
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
        """Unique in an experiment."""
        return (self.system.name, self.prompts, self.numbers, self.temperature, self.repeat)


def schedule_jobs(experiment: Experiment, sizes: Mapping[str, int]) -> list[BenchJob]:
    """All jobs in order. Prompts that do not fill a batch are left out.

    Args:
        experiment: what is measured.
        sizes: how many prompts each set has.

    Raises:
        InvalidOption: a batch is larger than a set.
    """
    jobs: list[BenchJob] = []
    rotation = 0
    for repeat in range(experiment.repeats):
        for batch in experiment.batch_sizes:
            for prompts, numbers in _batches(sizes, batch):
                seeds = tuple(_seed(experiment.seed, repeat, number) for number in numbers)
                for temperature in experiment.temperatures:
                    systems = experiment.systems_at(temperature, batch)
                    # The order rotates: which system ran before affects caches and clock rates.
                    first = rotation % len(systems)
                    rotation += 1
                    order = systems[first:] + systems[:first]
                    jobs += [BenchJob(system, prompts, numbers, temperature, repeat, seeds) for system in order]
    return jobs


def _batches(sizes: Mapping[str, int], batch: int) -> list[tuple[str, tuple[int, ...]]]:
    """Batches of all sets: the first of each set, then the second of each, and so on."""
    found = []
    for name, size in sizes.items():
        if batch > size:
            raise InvalidOption(
                f"batches of {batch}, and prompts {name!r:.40} are {size}", "give more prompts or smaller batches"
            )
        starts = range(0, size - batch + 1, batch)
        found += [(index, name, tuple(range(start, start + batch))) for index, start in enumerate(starts)]
    return [(name, numbers) for _, name, numbers in sorted(found, key=lambda entry: entry[0])]


def _seed(seed: int, repeat: int, number: int) -> int:
    return (seed << 24) + (repeat << 12) + number
