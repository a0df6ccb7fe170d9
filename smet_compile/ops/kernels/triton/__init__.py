"""Holds the kernels in Triton, for GPUs. Only ``supports`` can be imported where Triton is missing."""
