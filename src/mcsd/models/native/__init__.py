"""Models in our own kernels, see `mcsd.kernels`: all layers, or a draft head, are one call instead of hundreds or
thousands of small operations.
"""

from mcsd.models.native.head import NativeHead
from mcsd.models.native.layers import MOST_TOKENS, reads_blocks, replace_layers
from mcsd.models.native.linear import Kind, NativeLinear

__all__ = ["MOST_TOKENS", "Kind", "NativeHead", "NativeLinear", "reads_blocks", "replace_layers"]
