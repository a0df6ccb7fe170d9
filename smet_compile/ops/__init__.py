"""What is computed: the law, its registration as torch ops, the kernels, and the weight a module reads."""

from smet_compile.ops import library, sinks  # they register the ops
from smet_compile.ops.choose import Kernel, register_kernel, unregister_kernel
from smet_compile.ops.compact_weight import CompactWeight
from smet_compile.ops.sites import Site, canonical_name, find_sites

__all__ = [
    "CompactWeight",
    "Kernel",
    "Site",
    "canonical_name",
    "find_sites",
    "library",
    "register_kernel",
    "sinks",
    "unregister_kernel",
]
