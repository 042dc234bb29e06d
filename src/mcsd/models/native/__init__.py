"""Our own kernels for the few tokens of a tree, on CPUs with AVX-512 and VNNI.

The libraries' kernels are made for many rows. With the few of a tree these (``kernels.cpp``) read weights as fast as
memory delivers them, in whatever form, and a decoder layer is two calls and an attention instead of dozens of small
operations.
"""

from mcsd.models.native.layers import Kind, NativeLinear, replace_layers
from mcsd.models.native.library import available

__all__ = ["Kind", "NativeLinear", "available", "replace_layers"]
