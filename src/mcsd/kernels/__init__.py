"""Our own kernels, for CPUs with AVX-512 and VNNI: compiled here, and called from here.

The libraries' kernels are made for many rows. With the few of a tree these (``layers.cpp``) read weights as fast as
memory delivers them, in whatever form; `mcsd.models.native` says what they are given. ``distributions.cpp`` does in one
call what takes the libraries several for a large vocabulary.
"""

from mcsd.kernels.distributions import largest, softmax, suits
from mcsd.kernels.library import DTYPES, available, call, readable

__all__ = ["DTYPES", "available", "call", "largest", "readable", "softmax", "suits"]
