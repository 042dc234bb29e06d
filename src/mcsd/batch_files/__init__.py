"""Offline batches: a file of requests in OpenAI's batch format, through the code of the server. Extra ``server``."""

from typing import TYPE_CHECKING

from mcsd.batch_files.options import BatchOptions
from mcsd.lazy import lazy_attributes

if TYPE_CHECKING:
    from mcsd.batch_files.run import run_batch

__all__ = ["BatchOptions", "run_batch"]

__getattr__ = lazy_attributes(__name__, {"run_batch": "mcsd.batch_files.run"})
