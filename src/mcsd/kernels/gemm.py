"""The structs of ``gemm.h``: linear layers in a weight format."""

from ctypes import Structure, c_int64, c_void_p
from enum import IntEnum


class WeightFormat(IntEnum):
    """Formats of weights and of the activations that they are multiplied with; ``gemm.h`` has the layouts."""

    W8A8 = 0
    """int8 with a scale for each output; activations int8 with a scale for each token."""
    W8A16 = 1
    """As `W8A8`, but activations have a second int8 for the rounding error of the first."""
    BFP16 = 2
    """Block floating point: int16 with a scale for each group of 128 inputs, weights (of bfloat16) and activations."""
    W4A8 = 3
    """uint4 with a scale and a minimum for each group of 32 inputs; activations as in `W8A8`."""
    GGUF = 4
    """Tensors of a GGUF file as they are; activations int16 with a scale for each group of 256 inputs."""


class Linear(Structure):
    """A linear layer; the weight of format `GGUF` is an array of structs, see ``gguf.h``."""

    _fields_ = (
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("format", c_int64),
    )
