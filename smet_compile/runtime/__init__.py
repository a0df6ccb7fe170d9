"""When the topology changes: schedules, drop and grow, the manager between steps, checkpoints."""

from smet_compile.runtime.checkpoint import load_checkpoint, save_checkpoint
from smet_compile.runtime.events import SiteEvent, TopologyEvent
from smet_compile.runtime.manager import TopologyManager

__all__ = ["SiteEvent", "TopologyEvent", "TopologyManager", "load_checkpoint", "save_checkpoint"]
