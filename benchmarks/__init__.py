"""Measurements of this library. Each command is a module here: ``python -m benchmarks.kernels`` at the root."""
