"""Sparse memory-efficient training: weights stored, differentiated and optimised only where they are active."""

from smet_compile.api import sparsify
from smet_compile.convert import Report, export_dense, report
from smet_compile.optim import ActiveAdamW, NaiveAdamW, decay_groups
from smet_compile.runtime import SiteEvent, TopologyEvent, TopologyManager, load_checkpoint, save_checkpoint

__all__ = [
    "ActiveAdamW",
    "NaiveAdamW",
    "Report",
    "SiteEvent",
    "TopologyEvent",
    "TopologyManager",
    "decay_groups",
    "export_dense",
    "load_checkpoint",
    "report",
    "save_checkpoint",
    "sparsify",
]
