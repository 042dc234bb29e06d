"""mcsd on Ray: replicas of an engine behind one address, and offline inference on a cluster. Extra ``ray``."""

from typing import TYPE_CHECKING

from mcsd.lazy import lazy_attributes
from mcsd.ray.options import RayOptions

if TYPE_CHECKING:
    from mcsd.ray.application import deployment
    from mcsd.ray.data import map_batches, run_batch

__all__ = ["RayOptions", "deployment", "map_batches", "run_batch"]

__getattr__ = lazy_attributes(
    __name__,
    {"deployment": "mcsd.ray.application", "map_batches": "mcsd.ray.data", "run_batch": "mcsd.ray.data"},
)
