"""Decides when the topology changes: schedules, drop and grow, the manager between steps, checkpoints."""

from smet_compile.runtime.checkpoint import load_checkpoint, save_checkpoint
from smet_compile.runtime.history import SiteEvent, TopologyEvent
from smet_compile.runtime.in_optimizer import managers_left_out
from smet_compile.runtime.manager import TopologyManager
from smet_compile.runtime.policies import TopologyContext, mix_growth, needs_gradient

__all__ = [
    "SiteEvent",
    "TopologyContext",
    "TopologyEvent",
    "TopologyManager",
    "load_checkpoint",
    "managers_left_out",
    "mix_growth",
    "needs_gradient",
    "save_checkpoint",
]
