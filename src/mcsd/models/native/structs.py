"""What the kernels are told: the structs of ``kernels/layers.cpp``, which says what they hold."""

from ctypes import POINTER, Structure, c_double, c_int64, c_void_p


class Linear(Structure):
    """A linear layer."""

    _fields_ = (
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("kind", c_int64),
    )


class Norm(Structure):
    """A root-mean-square norm."""

    _fields_ = (("weight", c_void_p), ("eps", c_double))


class Before(Structure):
    """What stands before the attention of a layer."""

    _fields_ = (
        ("norm", Norm),
        ("into", Linear),
        ("queries", Norm),
        ("keys", Norm),
        ("heads", c_int64),
        ("shared", c_int64),
        ("size", c_int64),
    )


class Behind(Structure):
    """What stands behind the attention of a layer."""

    _fields_ = (("out", Linear), ("norm", Norm), ("into", Linear), ("down", Linear))


class Layer(Structure):
    """A decoder layer."""

    _fields_ = (("before", Before), ("behind", Behind), ("scaling", c_double), ("window", c_int64))


class Stack(Structure):
    """All layers of a model."""

    _fields_ = (("layers", POINTER(Layer)), ("count", c_int64), ("norm", Norm))


class Head(Structure):
    """A draft head."""

    _fields_ = (("fuse", Linear), ("join", Linear), ("each", Norm), ("stack", Stack), ("output", Linear))


class Place(Structure):
    """Where the tokens of a forward stand. What it points to beside the cache is ``kept``."""

    kept: object
    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("layer_stride", c_int64),
        ("row_stride", c_int64),
        ("head_stride", c_int64),
        ("rows", c_int64),
        ("before", c_int64),
        ("length", c_int64),
        ("lengths", c_void_p),
        ("offsets", c_void_p),
        ("sight", c_void_p),
        ("positions", c_int64),
        ("cosines", c_void_p),
        ("sines", c_void_p),
    )
