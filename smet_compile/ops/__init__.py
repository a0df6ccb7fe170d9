"""Computes with compact weights: the reference, the torch ops, the kernels, and the weight that a module reads."""

from smet_compile.ops import growth, library, row_scale, sinks  # importing them registers the ops
from smet_compile.ops.choose import Kernel, register_kernel, unregister_kernel
from smet_compile.ops.compact_weight import CompactWeight
from smet_compile.ops.sites import Site, canonical_name, find_sites

__all__ = [
    "CompactWeight",
    "Kernel",
    "Site",
    "canonical_name",
    "find_sites",
    "growth",
    "library",
    "register_kernel",
    "row_scale",
    "sinks",
    "unregister_kernel",
]
