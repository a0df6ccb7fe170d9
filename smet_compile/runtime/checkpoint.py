"""save_checkpoint and load_checkpoint: stop a run, go on in another process, bit for bit."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from smet_compile.format import arguments
from smet_compile.ops import find_sites
from smet_compile.runtime import checkpoint_file
from smet_compile.runtime.manager import TopologyManager


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    manager: TopologyManager | None = None,
    extra: Any = None,
) -> None:
    """Writes the run to one file, atomically: either the new checkpoint is there whole, or the old one.

    Args:
        path: the file (its folder is made). model, optimizer, manager: as they are between two steps.
        extra: what else the run needs, such as a scheduler's ``state_dict()``: nested dicts, lists and tuples of
            numbers, strings and tensors.

    torch's random states are saved too. Raises ValueError where the file cannot be written.
    """
    _check_arguments("save_checkpoint", path, model, optimizer, manager)
    checkpoint_file.write(
        path,
        {
            "layouts": _layouts(model),
            "model": dict(model.state_dict()),
            "optimizer": {
                "class": type(optimizer).__name__,
                "names": _names(model, optimizer),
                "state": optimizer.state_dict(),
            },
            "manager": None if manager is None else manager.state_dict(),
            "random": _random_states(),
            "extra": extra,
        },
    )


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    manager: TopologyManager | None = None,
) -> Any:
    """Loads what ``save_checkpoint`` wrote into a model made sparse in the same way; returns ``extra``.

    Parameters keep their storage, so an optimizer or a compiled model that holds them goes on. With an optimizer
    given, torch's random states are restored as well, and the run continues as if never stopped.

    Raises:
        ValueError: the file is not whole, was altered, has a newer format, or is of another model, block shape,
            optimizer or manager. Nothing in memory has then changed.
    """
    _check_arguments("load_checkpoint", path, model, optimizer, manager)
    saved = checkpoint_file.read(path)
    _check_model(path, saved, model)
    if optimizer is not None:
        _check_optimizer(path, saved["optimizer"], model, optimizer)
    if manager is not None:
        if saved["manager"] is None:
            raise ValueError(f"{path}: expected a checkpoint with a manager, got one saved without; leave it out")
        manager.check_state_dict(saved["manager"])
    if optimizer is not None:
        optimizer.load_state_dict(saved["optimizer"]["state"])
    model.load_state_dict(saved["model"])
    if optimizer is not None:
        _restore_random_states(saved["random"])
    if manager is not None:
        manager.load_state_dict(saved["manager"])
    return saved["extra"]


def _check_arguments(where: str, path: Any, model: Any, optimizer: Any, manager: Any) -> None:
    arguments.path(f"{where}: path", path)
    arguments.module(f"{where}: model", model)
    if optimizer is not None or where == "save_checkpoint":
        arguments.optimizer(f"{where}: optimizer", optimizer)
    if manager is not None and not isinstance(manager, TopologyManager):
        got = arguments.described(manager)
        raise ValueError(f"{where}: manager: expected a TopologyManager or None, got {got}; name other things extra=")


def _layouts(model: nn.Module) -> dict[str, list[list[int]]]:
    return {name: [list(part) for part in site.compact.op_layout()] for name, site in find_sites(model).items()}


def _names(model: nn.Module, optimizer: Optimizer) -> list[list[str | None]]:
    """The parameters of each group by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]


def _check_model(path: Any, saved: dict[str, Any], model: nn.Module) -> None:
    layouts = _layouts(model)
    for name, (shape, _, block) in saved["layouts"].items():
        if name not in layouts:
            raise ValueError(f"{path}: {name} is compact in the checkpoint, not in this model; sparsify it alike")
        if layouts[name][2] != block:
            raise ValueError(
                f"{path}: {name}: expected block shape {tuple(layouts[name][2])}, got {tuple(block)} in the "
                "checkpoint; sparsify with the same block_shape"
            )
        if layouts[name][0] != shape:
            raise ValueError(f"{path}: {name}: expected shape {layouts[name][0]}, got {shape} in the checkpoint")
    here, there = dict(model.state_dict()), saved["model"]
    for name in here.keys() ^ there.keys():
        where = "this model" if name in here else "the checkpoint"
        raise ValueError(f"{path}: {name} is only in {where}: the checkpoint is of another model")
    for name, tensor in here.items():
        if _kind(tensor) != _kind(there[name]):
            raise ValueError(
                f"{path}: {name}: expected {_kind(tensor)}, got {_kind(there[name])} in the checkpoint; it is of "
                "another model, density or dtype"
            )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def _check_optimizer(path: Any, saved: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
    if saved["class"] != type(optimizer).__name__:
        raise ValueError(
            f"{path}: expected the state of {type(optimizer).__name__}, got that of {saved['class']}; resume with "
            "the optimizer that was saved"
        )
    if saved["names"] != _names(model, optimizer):
        raise ValueError(f"{path}: the checkpoint's optimizer holds other parameters or groups; make it alike")


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    if states["cuda"] and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
