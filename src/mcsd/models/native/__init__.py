"""Our own kernels for the few tokens of a tree, on CPUs with AVX-512 and VNNI.

The libraries' kernels are made for many rows. With the few of a tree these (``kernels.cpp``) read weights as fast as
memory delivers them, in whatever form, and all layers of a model, or a draft head, are one call instead of hundreds or
thousands of small operations.
"""

from mcsd.models.native.head import NativeHead
from mcsd.models.native.layers import MOST_TOKENS, reads_blocks, replace_layers
from mcsd.models.native.library import available
from mcsd.models.native.linear import Kind, NativeLinear

__all__ = ["MOST_TOKENS", "Kind", "NativeHead", "NativeLinear", "available", "reads_blocks", "replace_layers"]
