"""Checks and timings of mcsd on a CUDA card, on models with random weights: see docs/gpu.md and ``python -m gpu``."""
