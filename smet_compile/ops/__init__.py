"""What is computed: the reference, its registration as torch ops, and the weight a module reads."""

from smet_compile.ops import library, matmul_library, sinks  # they register the ops
from smet_compile.ops.compact_weight import CompactWeight
from smet_compile.ops.sites import Site, canonical_name, find_sites

__all__ = ["CompactWeight", "Site", "canonical_name", "find_sites", "library", "matmul_library", "sinks"]
