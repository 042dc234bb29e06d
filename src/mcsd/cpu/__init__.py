"""The CPU back end: packed and quantized weights, fused layers, and decoders that run in our kernels."""
