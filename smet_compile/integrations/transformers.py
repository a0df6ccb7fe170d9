"""Sparse training by Hugging Face's ``Trainer``, in one line before ``trainer.train()``."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from smet_compile.api import sparsify
from smet_compile.convert import export_dense
from smet_compile.format.arguments import described
from smet_compile.ops import find_sites
from smet_compile.optim import ActiveAdamW
from smet_compile.optim.options import CommonOptions
from smet_compile.runtime import TopologyManager

_PREFIX = "smet/"


def sparse_training(
    trainer: Trainer, density: float | None = None, *, export: str | Path | None = None, **options: Any
) -> SparseTraining:
    """Has a ``Trainer`` train its model sparse: makes it sparse, and gives it an optimizer and a topology manager.

    ::

        trainer = Trainer(model, arguments, train_dataset=dataset)
        sparse_training(trainer, density=0.3)
        trainer.train()

    The optimizer is ``ActiveAdamW`` with rate, betas, epsilon and weight decay of the trainer's arguments; biases and
    norms do not decay. It is saved and restored by the trainer, with the manager's state. Numbers of the topology are
    logged with the trainer's own, as ``smet/density`` and so on, to whatever ``report_to`` names.

    Args:
        density: active share; None where the model is sparse already.
        export: folder that gets the dense model at the end, for ``from_pretrained``.
        options: those of ``sparsify``, ``TopologyManager`` and ``ActiveAdamW``, by name; ``total_steps`` is the
            trainer's own if it is left out.

    Returns: the callback that was added; ``manager`` is its topology manager, once training has begun.

    Raises:
        ValueError: the trainer has an optimizer, or a backend that makes its own (DeepSpeed, FSDP); a density for a
            model that is sparse, or none for one that is dense; an option that none of the three knows.
    """
    _check(trainer, density, options)
    own = {name: value for name, value in options.items() if name in _options_of(sparsify)}
    if density is not None:
        sparsify(trainer.model, density, **own)
    elif own:
        raise ValueError(f"{next(iter(own))}: expected no option of sparsify for a sparse model, got one; leave it out")
    trainer.optimizer = _make_optimizer(trainer, options)
    managed = {name: value for name, value in options.items() if name in _options_of(TopologyManager)}
    callback = SparseTraining(managed, export)
    trainer.callback_handler.callbacks.insert(0, callback)  # before those that report what is logged
    callback.prepare(trainer)
    return callback


class SparseTraining(TrainerCallback):
    """Logs numbers of the topology, and exports the model at the end; ``manager`` steps by itself."""

    def __init__(self, options: dict[str, Any], export: str | Path | None) -> None:
        self._options, self._export = options, export
        self.manager: TopologyManager | None = None

    def prepare(self, trainer: Trainer) -> None:
        """Makes the manager, which the optimizer's state brings along when the trainer resumes."""
        options = dict(self._options)
        if "total_steps" not in options:
            options["total_steps"] = _num_steps(trainer)
        model, optimizer = trainer.model, trainer.optimizer
        self.manager = TopologyManager(model, optimizer, **options | {"auto_step": True})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Adds the numbers of the topology to what is logged."""
        if logs is not None and self.manager is not None and "loss" in logs:
            numbers = {f"{_PREFIX}{name}": value for name, value in self.manager.metrics().items()}
            logs.update(numbers)
            if state.log_history:
                state.log_history[-1].update(numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the dense model."""
        if self._export is not None and self.manager is not None and state.is_world_process_zero:
            dense: Any = export_dense(self.manager.model)
            dense.save_pretrained(self._export)


def _check(trainer: Trainer, density: float | None, options: dict[str, Any]) -> None:
    if trainer.optimizer is not None:
        raise ValueError(
            f"trainer: expected one without an optimizer, got {type(trainer.optimizer).__name__}; leave optimizers= "
            "out, or make manager and optimizer yourself"
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            "trainer: expected one process or DistributedDataParallel, got DeepSpeed or FSDP, which make parameters "
            "anew; see docs/sharding.md for fully_shard"
        )
    is_sparse = bool(find_sites(trainer.model))
    if is_sparse == (density is not None):
        wanted = "None for a model that is sparse already" if is_sparse else "the active share, such as 0.3"
        raise ValueError(f"density: expected {wanted}, got {described(density)}")
    known = _options_of(sparsify) | _options_of(TopologyManager) | _options_of(ActiveAdamW)
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"{unknown[0]}: expected an option of sparsify, TopologyManager or ActiveAdamW, got another name; "
            f"known are {', '.join(sorted(known))}"
        )


def _options_of(called: Any) -> set[str]:
    """Returns the names of its options, without those that are given here."""
    parameters = inspect.signature(called).parameters
    given = {"self", "model", "optimizer", "density", "params", "lr", "betas", "eps", "weight_decay", "auto_step"}
    names = {name for name, each in parameters.items() if each.kind is not inspect.Parameter.VAR_KEYWORD}
    return (names | (set(CommonOptions.__annotations__) if called is ActiveAdamW else set())) - given


def _make_optimizer(trainer: Trainer, options: dict[str, Any]) -> ActiveAdamW:
    args, model = trainer.args, trainer.model
    decaying = set(trainer.get_decay_parameter_names(model))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if (name in decaying) is decays], "weight_decay": decay}
        for decays, decay in ((True, args.weight_decay), (False, 0.0))
    ]
    own = {name: value for name, value in options.items() if name in _options_of(ActiveAdamW) - {"seed"}}
    return ActiveAdamW(
        [group for group in groups if group["params"]],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        model=model,
        **own,
    )


def _num_steps(trainer: Trainer) -> int:
    """Returns the number of optimizer steps that the trainer will make."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    try:
        batches = len(trainer.get_train_dataloader())
    except TypeError as error:
        raise ValueError(
            "total_steps: expected a number for data without a length, got none; pass it, or max_steps="
        ) from error
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))
