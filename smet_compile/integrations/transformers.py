"""Sparse training by Hugging Face's ``Trainer``, in one line before ``trainer.train()``."""

from __future__ import annotations

import inspect
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from smet_compile.api import sparsify
from smet_compile.format.arguments import described
from smet_compile.integrations.rehearsal import rehearse
from smet_compile.ops import find_sites
from smet_compile.ops.optimizers import find_optimizers
from smet_compile.ops.sites import is_sparsified
from smet_compile.optim import ActiveAdamW, ActiveOptimizer
from smet_compile.optim.options import CommonOptions
from smet_compile.runtime import TopologyManager
from smet_compile.runtime.metrics import LOGGED

_ADDED_OTHERWISE = (
    "SmetCallback: expected to be added by sparse_training, got callbacks=[SmetCallback(...)] or add_callback; make "
    "the Trainer without it, then call sparse_training(trainer, density=...)"
)
_OF_TRAINER = {"params", "model", "optimizer_dict"}
"""Options by which the trainer says what an optimizer holds; it takes them out before it makes one."""
_ADAMW = ("adamw_torch", "adamw_torch_fused")
"""Names of torch's AdamW in ``TrainingArguments(optim=...)``, the default among them."""


def sparse_training(
    trainer: Trainer, density: float | None = None, *, export: str | Path | None = None, **options: Any
) -> SmetCallback:
    """Has a ``Trainer`` train its model sparse: makes it sparse, and gives it an optimizer and a topology manager.

    ::

        trainer = Trainer(model, arguments, train_dataset=dataset)
        sparse_training(trainer, density=0.3)
        trainer.train()

    The optimizer is ``ActiveAdamW`` with rate, betas, epsilon and weight decay of the trainer's arguments; biases and
    norms do not decay. ``Trainer(..., optimizer_cls_and_kwargs=(smet.ActiveLion, {"lr": 1e-4}))`` chooses another, one
    of torch's included. A model that is sparse already may come with its own, as ``optimizers=(optimizer, None)``. The
    optimizer is saved and restored by the trainer, with the manager's state. Numbers of the topology are logged with
    the trainer's own, as ``smet/density`` and so on, to whatever ``report_to`` names.

    Checkpoints hold compact weights for the run that goes on, and dense ones for ``from_pretrained``.
    ``trainer.save_model`` writes dense ones alone.

    Args:
        density: active share; None where the model is sparse already.
        export: folder that gets the dense model at the end, as by ``trainer.save_model``.
        options: those of ``sparsify``, ``TopologyManager`` and the optimizer, by name; ``total_steps`` is the
            trainer's own if it is left out.

    Returns: the callback that was added; ``manager`` is its topology manager.

    Raises:
        ValueError: the trainer makes its model anew (``model_init``), has an optimizer for dense weights, asks for
            another one than AdamW by ``optim``, or shards the model (DeepSpeed, FSDP); adapters alone are trained; a
            density for a model that is sparse, or none for one that is dense; an option that none of the three knows.
    """
    optimizer_class = _find_optimizer_class(trainer)
    _check(trainer, density, options, optimizer_class)
    if export is not None and not hasattr(trainer.model, "save_pretrained"):
        raise ValueError(
            f"export: expected a Hugging Face model, got {type(trainer.model).__name__}; leave it out, and call "
            "smet.export_dense(model) after training"
        )
    if "total_steps" not in options:
        options["total_steps"] = _num_steps(trainer)
    if density is not None:
        rehearse(
            trainer.model,
            density,
            _some(options, sparsify),
            _some(options, TopologyManager),
            lambda model: _rehearsed_optimizer(trainer, model, optimizer_class, options),
        )
        sparsify(trainer.model, density, **_some(options, sparsify))
    if trainer.optimizer is None and _is_active(optimizer_class):
        trainer.optimizer = _active_optimizer(trainer, trainer.model, optimizer_class, options)
    elif trainer.optimizer is None:
        trainer.create_optimizer()
    manager = TopologyManager(trainer.model, trainer.optimizer, **_some(options, TopologyManager))
    callback = SmetCallback(manager, export)
    trainer.callback_handler.callbacks.insert(0, callback)  # before those that report what is logged
    return callback


class SmetCallback(TrainerCallback):
    """Logs numbers of the topology, and exports the model at the end; ``manager`` steps by itself.

    ``sparse_training`` makes it. It cannot be passed to a ``Trainer``, which makes its optimizer later and shows it to
    callbacks when it is loaded already, and which calls those that report before those that it is given.
    """

    def __init__(
        self, manager: TopologyManager | None = None, export: str | Path | None = None, **options: Any
    ) -> None:
        self._export = export
        self.manager: Any = manager

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuses to be passed to a trainer."""
        raise ValueError(_ADDED_OTHERWISE)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks that the trainer trains what the manager manages, from where the manager stands."""
        manager, model, optimizer = self.manager, kwargs.get("model"), kwargs.get("optimizer")
        if manager is None:
            raise ValueError(_ADDED_OTHERWISE)
        if model is not manager.model:
            raise ValueError(
                "trainer: expected the model that was made sparse, got another one; call sparse_training for a trainer "
                "whose model stays"
            )
        if not any(found.optimizer is manager.optimizer for found in find_optimizers(optimizer, model.parameters())):
            raise ValueError(
                f"trainer: expected the optimizer of its topology manager, got another {type(optimizer).__name__}; "
                "leave trainer.optimizer as sparse_training made it"
            )
        _warn_of_steps(manager, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Adds the numbers of the topology to what is logged."""
        if logs is not None and "loss" in logs:
            numbers = self.manager.metrics(LOGGED)
            logs.update(numbers)
            if state.log_history:
                state.log_history[-1].update(numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the dense model."""
        if self._export is not None and state.is_world_process_zero:
            self.manager.model.save_pretrained(self._export)


def _warn_of_steps(manager: TopologyManager, state: Any) -> None:
    """Warns where the trainer and the manager do not agree on where the run begins or ends."""
    if bool(manager.num_steps) is not bool(state.global_step):
        warnings.warn(
            "sparse_training: expected trainer and topology manager to begin at the same step, got step "
            f"{state.global_step} and step {manager.num_steps}. A checkpoint that was saved with save_only_model has "
            "no manager; for a second call of train(), make trainer and model anew",
            stacklevel=2,
        )
    total = manager.settings["total_steps"]
    if state.max_steps != total:
        warnings.warn(
            f"sparse_training: expected a run of total_steps={total}, got one of {state.max_steps}; the topology is "
            "updated as in a run of the first length",
            stacklevel=2,
        )


def _find_optimizer_class(trainer: Trainer) -> Any:
    """Returns the class of the optimizer that the trainer has or was told to make."""
    if trainer.optimizer is not None:
        return type(trainer.optimizer)
    if trainer.optimizer_cls_and_kwargs is not None:
        return trainer.optimizer_cls_and_kwargs[0]
    if type(trainer).create_optimizer is not Trainer.create_optimizer:
        raise ValueError(
            f"trainer: expected the create_optimizer of Trainer, got that of {type(trainer).__name__}, which would not "
            "be called; make the model sparse and its optimizer first, and pass optimizers=(optimizer, None)"
        )
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if optim not in _ADAMW or trainer.args.optim_args:
        raise ValueError(
            f"optim: expected AdamW without optim_args, got {optim!r} with optim_args={trainer.args.optim_args!r}; "
            "pass Trainer(..., optimizer_cls_and_kwargs=(torch.optim.SGD, {...})) for another optimizer, and options "
            "of ActiveAdamW to sparse_training"
        )
    return ActiveAdamW


def _is_active(optimizer_class: Any) -> bool:
    return isinstance(optimizer_class, type) and issubclass(optimizer_class, ActiveOptimizer)


def _check(trainer: Trainer, density: float | None, options: dict[str, Any], optimizer_class: Any) -> None:
    _check_trainer(trainer, density)
    is_sparse = bool(find_sites(trainer.model))
    if is_sparse if density is not None else not is_sparsified(trainer.model):
        wanted = "None for a model that is sparse already" if is_sparse else "the active share, such as 0.3"
        raise ValueError(f"density: expected {wanted}, got {described(density)}")
    own = sorted(set(options) & _options_of(sparsify) - _options_of(TopologyManager))
    if own and density is None:
        raise ValueError(f"{own[0]}: expected no option of sparsify for a sparse model, got one; leave it out")
    known = _options_of(sparsify) | _options_of(TopologyManager)
    if trainer.optimizer is None:
        known |= _options_of(optimizer_class)
    unknown = sorted(set(options) - known)
    if unknown:
        name = getattr(optimizer_class, "__name__", described(optimizer_class))
        raise ValueError(
            f"{unknown[0]}: expected an option of sparsify, TopologyManager or {name}, got another name; "
            f"known are {', '.join(sorted(known))}"
        )


def _check_trainer(trainer: Trainer, density: float | None) -> None:
    if any(isinstance(callback, SmetCallback) for callback in trainer.callback_handler.callbacks):
        raise ValueError(
            "trainer: expected one that is not trained sparse yet, got a second call of sparse_training; make the "
            "trainer anew for other options"
        )
    if trainer.model_init is not None:
        raise ValueError(
            "trainer: expected one made with model=, got model_init=, which makes a dense model again in train(); pass "
            "a model"
        )
    if trainer.optimizer is not None and density is not None:
        raise ValueError(
            f"trainer: expected one without an optimizer, got {type(trainer.optimizer).__name__} of dense weights; "
            "leave optimizers= out, or make the model sparse before its optimizer and leave density out"
        )
    is_sharded = getattr(trainer, "is_distributed_loading_by_transformers", False)
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or is_sharded:
        raise ValueError(
            "trainer: expected one process or DistributedDataParallel, got DeepSpeed, FSDP or a model that was sharded "
            "when it was loaded, which make parameters anew; see docs/sharding.md for fully_shard"
        )
    sites, trains = find_sites(trainer.model), any(p.requires_grad for p in trainer.model.parameters())
    frozen = all(not site.values.requires_grad for site in sites.values()) if sites else not trains
    if frozen or getattr(trainer.model, "peft_config", None):
        raise ValueError(
            "trainer: expected a model whose compact weights are trained, got frozen ones, as under adapters; make the "
            "base sparse before get_peft_model, and leave sparse_training out: adapters are dense"
        )


def _options_of(called: Any) -> set[str]:
    """Returns the names of its options, without those that are given here; none for an optimizer of others."""
    is_optimizer = called is not sparsify and called is not TopologyManager
    if is_optimizer and not _is_active(called):
        return set()
    parameters = inspect.signature(called).parameters
    given = {"self", "model", "optimizer", "density", "params", "lr", "betas", "eps", "weight_decay", "auto_step"}
    names = {name for name, each in parameters.items() if each.kind is not inspect.Parameter.VAR_KEYWORD}
    return (names | (set(CommonOptions.__annotations__) if is_optimizer else set())) - given


def _some(options: dict[str, Any], called: Any) -> dict[str, Any]:
    """Returns the options that something takes."""
    return {name: value for name, value in options.items() if name in _options_of(called)}


def _rehearsed_optimizer(trainer: Trainer, model: Any, optimizer_class: Any, options: dict[str, Any]) -> Any:
    """Returns the optimizer of a copy of the model. Raises ValueError for what its class does not take."""
    if _is_active(optimizer_class):
        return _active_optimizer(trainer, model, optimizer_class, options)
    chosen = dict(trainer.optimizer_cls_and_kwargs[1])
    if chosen.keys() & _OF_TRAINER:
        return torch.optim.AdamW(model.parameters())
    try:
        return optimizer_class(model.parameters(), **chosen)
    except TypeError as error:
        raise ValueError(
            f"optimizer_cls_and_kwargs: expected options of {optimizer_class.__name__}, got {', '.join(chosen)}: "
            f"{error}; make the trainer anew with others"
        ) from error


def _options_of_optimizer(trainer: Trainer, optimizer_class: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Returns rate and options of an active optimizer: the trainer's, and those that were passed by name."""
    args = trainer.args
    chosen: dict[str, Any] = {"lr": args.learning_rate}
    if trainer.optimizer_cls_and_kwargs is None:
        chosen |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    else:
        chosen |= trainer.optimizer_cls_and_kwargs[1]
    names = _options_of(optimizer_class) - {"seed"}
    return chosen | {name: value for name, value in options.items() if name in names}


def _active_optimizer(trainer: Trainer, model: Any, optimizer_class: Any, options: dict[str, Any]) -> Any:
    """Returns the optimizer that the trainer would make in ``train()``, for a model that is its own or a copy."""
    decaying = set(trainer.get_decay_parameter_names(model))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if (name in decaying) is decays], "weight_decay": decay}
        for decays, decay in ((True, trainer.args.weight_decay), (False, 0.0))
    ]
    chosen = _options_of_optimizer(trainer, optimizer_class, options) | {"model": model}
    return optimizer_class([group for group in groups if group["params"]], **chosen)


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
