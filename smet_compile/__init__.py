"""Sparse memory-efficient training: weights stored, differentiated and optimised only where they are active."""

from smet_compile.api import sparsify
from smet_compile.convert import Report, export_dense, materialize, report
from smet_compile.explain import Explanation, explain
from smet_compile.microscope import Inspection, inspect
from smet_compile.optim import ActiveAdamW, ActiveLion, ActiveScale, ActiveSGD, NaiveAdamW, decay_groups
from smet_compile.plan import Plan, plan
from smet_compile.runtime import SiteEvent, TopologyEvent, TopologyManager, load_checkpoint, save_checkpoint
from smet_compile.train_step import TrainStep, compile_train_step

__all__ = [
    "ActiveAdamW",
    "ActiveLion",
    "ActiveSGD",
    "ActiveScale",
    "Explanation",
    "Inspection",
    "NaiveAdamW",
    "Plan",
    "Report",
    "SiteEvent",
    "TopologyEvent",
    "TopologyManager",
    "TrainStep",
    "compile_train_step",
    "decay_groups",
    "explain",
    "export_dense",
    "inspect",
    "load_checkpoint",
    "materialize",
    "plan",
    "report",
    "save_checkpoint",
    "sparsify",
]
