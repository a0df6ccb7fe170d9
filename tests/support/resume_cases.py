"""Runs that stop and resume. As a program: goes on from a folder of checkpoints, prints what happened.

python -m tests.support.resume_cases FOLDER FIRST STEPS
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import smet_compile as smet
from tests.support.small_models import two_layers
from tests.support.training import train


@dataclass(frozen=True)
class Case:
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    grow: str = "random"
    dtype: torch.dtype = torch.float32
    block_shape: Any = 1
    options: dict[str, Any] = field(default_factory=dict)
    density: float = 0.5
    num_events: int = 5

    def make(self) -> "Run":
        """Makes a fresh run, the same in every process."""
        torch.manual_seed(0)
        model = two_layers(dropout=0.2).to(self.dtype)
        smet.sparsify(model, self.density, block_shape=self.block_shape, dense_as_compact=True)
        optimizer = self.optimizer(model)
        options = {"schedule": "cosine", "drop_fraction": 0.3, "grow": self.grow} | self.options
        manager = smet.TopologyManager(model, optimizer, total_steps=40, every=4, **options)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
        return Run(model, optimizer, manager, scheduler)


@dataclass
class Run:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    manager: smet.TopologyManager
    scheduler: torch.optim.lr_scheduler.LRScheduler

    def train(self, first: int, steps: int) -> list[float]:
        return train(self.model, self.optimizer, self.manager, first=first, steps=steps, scheduler=self.scheduler)

    def save(self, path: Path) -> None:
        extra = {"scheduler": self.scheduler.state_dict()}
        smet.save_checkpoint(path, self.model, self.optimizer, self.manager, extra=extra)

    def load(self, path: Path) -> None:
        extra = smet.load_checkpoint(path, self.model, self.optimizer, self.manager)
        self.scheduler.load_state_dict(extra["scheduler"])

    def history(self) -> list[Any]:
        return [event.to_dict() for event in self.manager.history]


def active(model: nn.Module, **options: Any) -> smet.ActiveAdamW:
    return smet.ActiveAdamW(model, lr=1e-2, warmup_steps=5, weight_decay=0.1, **options)


def torch_optimizer(kind: type, **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: kind(model.parameters(), **options)


CASES = {
    "active_adamw": Case(active),
    "active_adamw_gradient": Case(active, grow="gradient"),
    "active_adamw_tiles": Case(active, grow="gradient", block_shape=(4, 4)),
    "bf16_states": Case(lambda model: active(model, moment_dtype=torch.bfloat16)),
    "bf16_states_gradient": Case(lambda model: active(model, moment_dtype=torch.bfloat16), grow="gradient"),
    "int8_states": Case(lambda model: active(model, moment_dtype="int8")),
    "int8_states_tiles": Case(lambda model: active(model, moment_dtype="int8"), grow="gradient", block_shape=(4, 4)),
    "bf16_model": Case(active, dtype=torch.bfloat16),
    "fp64": Case(active, dtype=torch.float64),
    "naive_adamw": Case(lambda model: smet.NaiveAdamW(model, lr=1e-2)),
    "adamw": Case(torch_optimizer(torch.optim.AdamW, lr=1e-2)),
    "adamw_gradient": Case(torch_optimizer(torch.optim.AdamW, lr=1e-2), grow="gradient"),
    "sgd_momentum": Case(torch_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)),
    "rmsprop": Case(torch_optimizer(torch.optim.RMSprop, lr=1e-3)),
    "adagrad": Case(torch_optimizer(torch.optim.Adagrad, lr=1e-2)),
    "static": Case(active, options={"schedule": "none"}, num_events=0),
    "sparser": Case(active, density=1.0, num_events=7, options={"density_schedule": [(6, 0.5), (14, 0.3)]}),
    "denser_int8": Case(
        lambda model: active(model, moment_dtype="int8"),
        grow="momentum",
        block_shape=(4, 4),
        density=0.2,
        num_events=7,
        options={"density_schedule": [(6, 0.4), (14, 0.9)], "drop": "saliency"},
    ),
    "sparser_torch": Case(
        torch_optimizer(torch.optim.AdamW, lr=1e-2),
        block_shape=(1, 4),
        density=1.0,
        num_events=2,
        options={"density_schedule": [(6, 0.5), (11, 0.3)], "schedule": "none"},
    ),
}


def main(folder: Path, first: int, steps: int) -> dict[str, Any]:
    results = {}
    for name, case in CASES.items():
        run = case.make()
        run.load(folder / f"{name}.ckpt")
        results[name] = {"losses": run.train(first, steps), "history": run.history()}
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
