"""mcsd on a Ray cluster. Extra ``ray``."""

from typing import TYPE_CHECKING

from mcsd.lazy import lazy_attributes

if TYPE_CHECKING:
    from mcsd.ray.data import map_batches, run_batch

__all__ = ["map_batches", "run_batch"]

__getattr__ = lazy_attributes(__name__, {"map_batches": "mcsd.ray.data", "run_batch": "mcsd.ray.data"})
