"""How weights move: AdamW on active weights only, each block by its own age."""

from smet_compile.optim.active_adamw import ActiveAdamW, NaiveAdamW
from smet_compile.optim.groups import decay_groups

__all__ = ["ActiveAdamW", "NaiveAdamW", "decay_groups"]
