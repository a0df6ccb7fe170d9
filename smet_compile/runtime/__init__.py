"""Decides when the topology changes: schedules, drop and grow, the manager between steps, checkpoints."""

from smet_compile.runtime.checkpoint import load_checkpoint, save_checkpoint
from smet_compile.runtime.manager import TopologyManager
from smet_compile.runtime.update import SiteEvent, TopologyEvent

__all__ = ["SiteEvent", "TopologyEvent", "TopologyManager", "load_checkpoint", "save_checkpoint"]
