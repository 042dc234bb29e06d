"""The structs of ``decoder.h``: decoder layers, decoders and draft heads."""

from ctypes import POINTER, Structure, c_bool, c_double, c_int64, c_void_p

from mcsd.kernels.gemm import Linear


class RMSNorm(Structure):
    """A root-mean-square norm; without a weight it only normalizes, and with a negative eps it does nothing."""

    _fields_ = (("weight", c_void_p), ("eps", c_double))


class PreAttention(Structure):
    """The part of a decoder layer up to the attention."""

    _fields_ = (
        ("input_norm", RMSNorm),
        ("qkv_proj", Linear),
        ("q_norm", RMSNorm),
        ("k_norm", RMSNorm),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_size", c_int64),
    )


class PostAttention(Structure):
    """The part of a decoder layer after the attention."""

    _fields_ = (("o_proj", Linear), ("norm", RMSNorm), ("gate_up_proj", Linear), ("down_proj", Linear))


class DecoderLayer(Structure):
    """A decoder layer; ``sliding_window`` is 0 if it attends to all positions, or all but the first."""

    _fields_ = (
        ("pre_attention", PreAttention),
        ("post_attention", PostAttention),
        ("scaling", c_double),
        ("sliding_window", c_int64),
        ("skips_first", c_bool),
    )


class Decoder(Structure):
    """All layers of a model and the last norm."""

    _fields_ = (("layers", POINTER(DecoderLayer)), ("num_layers", c_int64), ("norm", RMSNorm))


class HeadWeights(Structure):
    """A draft head; a linear layer without a weight is absent."""

    _fields_ = (
        ("feature_norm", RMSNorm),
        ("feature_parts", c_int64),
        ("feature_proj", Linear),
        ("state_norm", RMSNorm),
        ("embedding_norm", RMSNorm),
        ("embedding_first", c_bool),
        ("input_proj", Linear),
        ("normed_residual", c_bool),
        ("decoder", Decoder),
        ("output_norm", RMSNorm),
        ("lm_head", Linear),
    )
