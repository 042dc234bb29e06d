"""Which replica answers a request: one that has probably read its beginning, unless it has more to do than others."""

import math
import random
from collections.abc import Sequence
from hashlib import blake2b

SLACK = 1.25
"""A replica has at most this many times the requests of the mean, rounded up."""

_running: dict[str, int] = {}


def note_replicas(application: str, count: int) -> None:
    """Called by the router of this process when replicas are added or end."""
    _running[application] = count


def running_replicas(application: str) -> int:
    """How many replicas of an application the router of this process knows."""
    return _running.get(application, 0)


def choose(beginning: str, names: Sequence[str], running: Sequence[int]) -> int:
    """The index of the replica for a beginning: consistent hashing with bounded loads.

    Args:
        beginning: of the request; a request without one goes to the replica with the fewest requests.
        names: of the replicas.
        running: requests of each.
    """
    if not beginning:
        fewest = min(running)
        return random.choice([index for index, count in enumerate(running) if count == fewest])
    bound = math.ceil(SLACK * (sum(running) + 1) / len(names))
    key = blake2b(beginning.encode(errors="replace"), digest_size=16).digest()
    free = [index for index, count in enumerate(running) if count < bound]
    return max(free, key=lambda index: blake2b(names[index].encode(), digest_size=8, key=key).digest())
