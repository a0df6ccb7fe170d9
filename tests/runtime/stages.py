"""Makes runs with density stages: by block shape, direction and optimizer."""

from typing import Any

import torch

import smet_compile as smet
from tests.support.small_models import two_layers
from tests.support.wrappers import Lookahead, LookaheadInside

BLOCKS = (1, (1, 4), (4, 4))
DOWN, UP = [(2, 0.5), (4, 0.2)], [(2, 0.5), (4, 1.0)]
DIRECTIONS = {"down": (1.0, DOWN), "up": (0.2, UP)}
OPTIMIZERS = {
    "active": lambda model: smet.ActiveAdamW(model, lr=1e-2, warmup_steps=5),
    "bf16": lambda model: smet.ActiveAdamW(model, lr=1e-2, moment_dtype=torch.bfloat16),
    "int8": lambda model: smet.ActiveAdamW(model, lr=1e-2, moment_dtype="int8"),
    "lion": lambda model: smet.ActiveLion(model, lr=1e-3),
    "scale": lambda model: smet.ActiveScale(model, lr=1e-2),
    "torch": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True),
    "rprop": lambda model: torch.optim.Rprop(model.parameters()),
    "inside": lambda model: LookaheadInside(smet.ActiveAdamW(model, lr=1e-2), k=1),
    "lookahead": lambda model: Lookahead(smet.ActiveAdamW(model, lr=1e-2), k=2),
}


def staged(density: float, stages: Any, block_shape: Any = 1, **options: Any) -> tuple[Any, Any, Any]:
    model = smet.sparsify(two_layers(), density, block_shape=block_shape, dense_as_compact=True)
    optimizer = options.pop("optimizer", OPTIMIZERS["active"])(model)
    given = {"total_steps": 100, "schedule": "none", "density_schedule": stages, "auto_step": False} | options
    return model, optimizer, smet.TopologyManager(model, optimizer, **given)
