"""The struct of ``attention.h``."""

from ctypes import Structure, c_int64, c_void_p


class AttentionMetadata(Structure):
    """The tokens of a forward and the KV cache. ``owners`` keeps the memory that the pointers are to."""

    owners: object
    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("layer_stride", c_int64),
        ("sequence_stride", c_int64),
        ("head_stride", c_int64),
        ("sequences", c_int64),
        ("earlier", c_int64),
        ("length", c_int64),
        ("lengths", c_void_p),
        ("offsets", c_void_p),
        ("mask", c_void_p),
        ("positions", c_int64),
        ("cosines", c_void_p),
        ("sines", c_void_p),
    )
