"""Sparse training by Lightning's ``Trainer``, with one callback."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from smet_compile.api import sparsify
from smet_compile.convert import export_dense
from smet_compile.format import arguments
from smet_compile.integrations.options import split_options
from smet_compile.integrations.rehearsal import rehearse_options
from smet_compile.ops import find_sites
from smet_compile.runtime import TopologyManager
from smet_compile.runtime.metrics import LOGGED
from smet_compile.runtime.stages import active_blocks, begun_with, take_stages

_MANAGER = "manager"


class SparseTraining(Callback):
    """Has Lightning's ``Trainer`` train a module sparse.

    ::

        trainer = Trainer(max_epochs=3, callbacks=[SparseTraining(density=0.3)])
        trainer.fit(module, loader)

    The linear weights of the module become compact before ``configure_optimizers`` is called, which makes any optimizer
    that a ``TopologyManager`` takes, such as ``ActiveAdamW(self, lr=...)``. After each batch with an optimizer step the
    topology is updated when that is due. Its numbers are logged as ``smet/density`` and so on, every
    ``log_every_n_steps`` steps. Checkpoints hold the state of the manager, and ``fit(ckpt_path=...)`` goes on with it.

    Args:
        density: active share; None where the module is sparse already.
        export: file that gets the state dict of the dense module at the end, for ``load_state_dict`` of the module's
            class without this callback.
        override: names of the manager's settings that may differ from those of the run that is resumed.
        options: those of ``sparsify`` and ``TopologyManager``, by name; ``total_steps`` is the trainer's
            ``estimated_stepping_batches`` if it is left out.

    Attributes:
        manager: the topology manager, once ``fit`` has begun.

    Raises:
        ValueError: an option that neither knows, or a value that no model takes. In ``fit``: a strategy other than one
            device or DistributedDataParallel, a precision plugin that replaces layers, a callback that averages
            weights or prunes; a density for a module that is sparse, or none for one that is dense; layers that the
            module makes in ``setup``; a run without a length; another setting than that of the run that is resumed.
    """

    def __init__(
        self,
        density: float | None = None,
        *,
        export: str | os.PathLike[str] | None = None,
        override: Iterable[str] = (),
        **options: Any,
    ) -> None:
        functions: dict[str, Any] = {"sparsify": sparsify, "TopologyManager": TopologyManager}
        split = split_options(options, functions, {"self", "model", "optimizer", "density", "auto_step"})
        self._of_sparsify, self._of_manager = split["sparsify"], split["TopologyManager"]
        rehearse_options(self._of_manager)
        self._density = density
        self._export = None if export is None else Path(arguments.path("export", export))
        self._override = tuple(override)
        self._made_sparse: weakref.WeakKeyDictionary[LightningModule, dict[str, int]] = weakref.WeakKeyDictionary()
        self._weights: set[str] = set()
        self._loaded: dict[str, Any] | None = None
        self._stage = ""
        self._last_step = 0
        self.manager: TopologyManager | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the module sparse, before its optimizers are made and before a checkpoint is loaded."""
        _check_trainer(trainer)
        self._stage, self._loaded = stage, None
        if is_overridden("configure_model", pl_module):  # the trainer calls it again, and it must then change nothing
            with trainer.precision_plugin.module_init_context():
                pl_module.configure_model()
        if pl_module not in self._made_sparse:
            self._make_sparse(pl_module)
            self._made_sparse[pl_module] = active_blocks(pl_module)
        if self._of_manager.get("density_schedule") is not None:
            take_stages(pl_module)  # a checkpoint is loaded before there is a manager
        self._weights = _matrices(pl_module)

    def _make_sparse(self, module: LightningModule) -> None:
        if bool(find_sites(module)) == (self._density is not None):
            wanted = (
                "None for a module that is sparse already" if find_sites(module) else "the active share, such as 0.3"
            )
            raise ValueError(f"density: expected {wanted}, got {arguments.described(self._density)}")
        if self._density is not None:
            sparsify(module, self._density, **self._of_sparsify)
        elif set(self._of_sparsify) - set(self._of_manager):
            name = next(iter(set(self._of_sparsify) - set(self._of_manager)))
            raise ValueError(f"{name}: expected no option of sparsify for a sparse module, got one; leave it out")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the manager, for the optimizers that the module has made, and gives it the state of a checkpoint."""
        loaded, self._loaded = self._loaded, None
        if changed := sorted(_matrices(pl_module) ^ self._weights):
            raise ValueError(
                f"{changed[0]}: expected the layers that the module had before its setup, got others; make them in "
                "__init__, or in a configure_model that changes nothing when it is called again"
            )
        options = dict(self._of_manager)
        if "total_steps" not in options:
            options["total_steps"] = _num_steps(trainer)
        model: Any = trainer.strategy.model  # wrapped for data parallelism
        with nullcontext() if loaded is None else begun_with(self._made_sparse[pl_module]):
            self.manager = TopologyManager(model, trainer.optimizers, **options, auto_step=False)
        if loaded is not None:
            self.manager.load_state_dict(loaded, override=self._override)
        elif trainer.global_step > 0:
            warnings.warn(
                f"SparseTraining: expected the state of a topology manager, since the trainer has made "
                f"{trainer.global_step} steps, got none; its history and its steps begin anew",
                stacklevel=2,
            )
        self._last_step = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the number of steps that a checkpoint has restored."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the topology and logs its numbers, where an optimizer made a step in this batch."""
        if self.manager is None or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self.manager.step()
        every = int(getattr(trainer, "log_every_n_steps", 0))
        if every > 0 and not trainer.barebones and self.manager.num_steps % every == 0:
            numbers = self.manager.metrics(LOGGED)
            pl_module.log_dict(numbers, on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the dense state dict."""
        if self._export is not None and trainer.is_global_zero:
            self._export.parent.mkdir(parents=True, exist_ok=True)
            torch.save(export_dense(pl_module).state_dict(), self._export)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the manager, for a checkpoint."""
        return {} if self.manager is None else {_MANAGER: self.manager.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of a checkpoint, which the manager gets when it is made. Evaluation makes no manager."""
        self._loaded = state_dict.get(_MANAGER) if self._stage == "fit" else None


def _check_trainer(trainer: Trainer) -> None:
    """Raises ValueError for what would train, or average, something else than the compact weights."""
    strategy, plugin = trainer.strategy, trainer.precision_plugin
    if isinstance(strategy, DeepSpeedStrategy) or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(
            f"strategy: expected one device or DistributedDataParallel, got {type(strategy).__name__}, which makes "
            "parameters anew; see docs/sharding.md for fully_shard in a loop of your own"
        )
    if isinstance(plugin, BitsandbytesPrecision | TransformerEnginePrecision):
        raise ValueError(
            f"precision: expected one that keeps the layers, got {type(plugin).__name__}, which replaces them; pass "
            '"bf16-mixed", "bf16-true" or "32-true"'
        )
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise ValueError(
                f"callbacks: expected none that averages weights, got {type(callback).__name__}, which would add up "
                "rows that belong to different weights once the topology has changed; average export_dense(module), "
                "as docs/limits.md does"
            )
        if isinstance(callback, ModelPruning):
            raise ValueError(
                f"callbacks: expected none that prunes, got {type(callback).__name__}, which finds no compact weight "
                "and would prune biases alone; leave it out, since the topology says which weights are zero, or pass "
                "SparseTraining(density_schedule=...) for a density that falls"
            )


def _matrices(module: LightningModule) -> set[str]:
    """Returns the names of the parameters of two or more dimensions, and of the compact weights."""
    dense = {name for name, parameter in module.named_parameters() if parameter.dim() > 1}
    return dense | find_sites(module).keys()


def _num_steps(trainer: Trainer) -> int:
    """Returns the number of optimizer steps that the trainer expects to make."""
    found = trainer.estimated_stepping_batches
    if not 0 < found < float("inf"):
        raise ValueError(
            "total_steps: expected a number for a run without a length, got none; pass it, or Trainer(max_steps=...)"
        )
    return int(found)
