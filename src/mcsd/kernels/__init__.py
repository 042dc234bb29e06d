"""C++ kernels for CPUs with AVX2 or AVX-512 VNNI, compiled on this machine when they are first needed.

PyTorch's own kernels are made for large batches. For the few tokens of a draft tree these are faster, as they read
weights at the speed of memory: linear layers on the quantized matrices of a GGUF file as they are (``gguf``),
attention to a KV cache and a tree (``attention``), whole decoders and draft heads in one call (``decoder``), and
softmax and top-k of logits over a large vocabulary (``distributions``). With AVX-512 VNNI there are also linear layers
in four packed weight formats (``packed_gemm``) and on bfloat16 weights as they are (``bf16_linear``). The ctypes
mirror of a C++ struct has the name of its header: ``gemm.h``, ``gemm.py``.

`mcsd.cpu` and `mcsd.models` use them for models and `mcsd.ops` for logits where `has_kernels`, `available` and
`supported` say so. Elsewhere, and where no compiler is found, PyTorch does the same work.
"""

from mcsd.kernels.bf16_linear import bf16_linear, bf16_linear_supported
from mcsd.kernels.distributions import LARGE_VOCABULARY, softmax, supported, top_k
from mcsd.kernels.gemm import WeightFormat
from mcsd.kernels.library import DTYPES, available, call, has_kernels, readable

__all__ = [
    "DTYPES",
    "LARGE_VOCABULARY",
    "WeightFormat",
    "available",
    "bf16_linear",
    "bf16_linear_supported",
    "call",
    "has_kernels",
    "readable",
    "softmax",
    "supported",
    "top_k",
]
