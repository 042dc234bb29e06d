"""The CUDA back end: Triton kernels for the decoder layers."""
