"""Kernels in Triton, for GPUs. Only ``supports`` can be imported where Triton is not."""
