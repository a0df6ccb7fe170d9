"""Sparse memory-efficient training: weights stored, differentiated and optimised only where they are active."""

from smet_compile.api import sparsify
from smet_compile.convert import Report, export_dense, report

__all__ = [
    "Report",
    "export_dense",
    "report",
    "sparsify",
]
