"""Sparse memory-efficient training: weights stored, differentiated and optimised only where they are active."""

from smet_compile.api import sparsify
from smet_compile.convert import Report, export_dense, report
from smet_compile.optim import ActiveAdamW, NaiveAdamW, decay_groups

__all__ = [
    "ActiveAdamW",
    "NaiveAdamW",
    "Report",
    "decay_groups",
    "export_dense",
    "report",
    "sparsify",
]
