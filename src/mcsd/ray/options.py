"""The options of replicas, declared once for Python and the command line. Imports neither Ray nor torch."""

from dataclasses import dataclass

from mcsd.config import option
from mcsd.errors import check_int, check_number

MAX_REPLICAS = 10_000
_PANEL = "Ray"


@dataclass(frozen=True)
class RayOptions:
    """How many replicas Ray Serve runs, and what each of them gets.

    Attributes:
        num_replicas: engines, each in a process of its own. 0: the server has one engine, without Ray.
        num_cpus: threads of a replica, and cores that Ray counts for it.
        num_gpus: that Ray gives to a replica.

    Raises:
        InvalidOption: a value outside its range.
    """

    num_replicas: int = option(
        0, "--ray", help="Run this many replicas by Ray Serve.", type=int, shown="one engine, without Ray", panel=_PANEL
    )
    num_cpus: int = option(1, "--ray-cpus", help="Cores of a replica.", type=int, panel=_PANEL)
    num_gpus: float = option(0.0, "--ray-gpus", help="GPUs of a replica.", type=float, panel=_PANEL)

    def __post_init__(self) -> None:
        check_int("num_replicas", self.num_replicas, 0, MAX_REPLICAS)
        check_int("num_cpus", self.num_cpus, 1, 4096)
        check_number("num_gpus", self.num_gpus, 0, 1)
