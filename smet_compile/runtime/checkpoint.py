"""save_checkpoint and load_checkpoint: stop a run, go on in another process, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from smet_compile.format import arguments
from smet_compile.ops import canonical_name
from smet_compile.ops.loaded import check_keys, kind_of
from smet_compile.ops.optimizers import find_optimizers, state_holders
from smet_compile.runtime import checkpoint_file
from smet_compile.runtime.manager import TopologyManager
from smet_compile.runtime.random_states import check_random_states, random_states, restore_random_states
from smet_compile.runtime.rollback import all_or_nothing
from smet_compile.runtime.saved_model import (
    Rename,
    check_model,
    layouts_of,
    loadable,
    model_entries,
    model_metadata,
    renaming,
)
from smet_compile.runtime.saved_optimizer import check_optimizer_state, has_usual_parts, numbers_with_state
from smet_compile.runtime.settings import check_override


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    manager: TopologyManager | None = None,
    extra: Any = None,
) -> None:
    """Writes the run to one file, atomically: either the new checkpoint is there whole, or the old one.

    Args:
        path: the file (its folder is made). model, optimizer, manager: as they are between two steps. Of a wrapped
            optimizer, and of several in a list, the state of each is saved.
        extra: what else the run needs, such as a scheduler's ``state_dict()``: nested dicts, lists and tuples of
            numbers, strings and tensors.

    torch's random states are saved too. A model that ``torch.compile`` or data parallelism wraps is saved under the
    names of the plain one. Raises ValueError where the file cannot be written, or cannot hold a value exactly.
    """
    _check_arguments("save_checkpoint", path, model, optimizer, manager)
    first, *others = [_optimizer_entry(model, each) for each in state_holders(optimizer, model.parameters())]
    checkpoint_file.write(
        path,
        {
            "layouts": layouts_of(model),
            "model": model_entries(model),
            "model_metadata": model_metadata(model),
            "optimizer": first,
            "other_optimizers": others,
            "manager": None if manager is None else manager.state_dict(),
            "random": random_states(),
            "extra": extra,
        },
    )


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    manager: TopologyManager | None = None,
    *,
    override: Iterable[str] = (),
) -> Any:
    """Loads what ``save_checkpoint`` wrote into a model made sparse in the same way; returns ``extra``.

    Parameters keep their storage, so an optimizer or a compiled model that holds them goes on. With an optimizer
    given, torch's random states are restored as well, and the run continues as if never stopped.

    Args:
        override: names of the manager's settings (``"total_steps"``, ``"every"``, ...) that may differ from those of
            the saved run, which then goes on with this manager's.

    Raises:
        ValueError: the file is not whole, was altered, has a newer format, or is of another model, block shape,
            optimizer or manager, or holds a value that no run has. Nothing in memory has then changed.
    """
    _check_arguments("load_checkpoint", path, model, optimizer, manager)
    if check_override(override) and manager is None:
        raise ValueError("override: expected a manager whose settings differ, got none; pass manager=")
    saved = checkpoint_file.read(path)
    holders = [] if optimizer is None else state_holders(optimizer, model.parameters())
    try:
        _check(saved, model, holders, manager, override, type(optimizer).__name__)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        with all_or_nothing(model, holders, manager):
            model.load_state_dict(loadable(saved["model"], saved.get("model_metadata"), model))
            if holders:
                _load_optimizers(holders, [entry["state"] for entry in _entries(saved)])
                restore_random_states(saved["random"])
            if manager is not None:
                manager.load_state_dict(saved["manager"], override=override)
    except Exception as error:
        raise ValueError(f"{path}: could not be loaded ({error}); everything is as it was before") from error
    return saved["extra"]


def _check_arguments(where: str, path: Any, model: Any, optimizer: Any, manager: Any) -> None:
    arguments.path(f"{where}: path", path)
    arguments.module(f"{where}: model", model)
    given = optimizer is not None or where == "save_checkpoint"
    if given and not find_optimizers(optimizer, model.parameters()):
        arguments.optimizer(f"{where}: optimizer", optimizer)
    if manager is not None and not isinstance(manager, TopologyManager):
        got = arguments.described(manager)
        raise ValueError(f"{where}: manager: expected a TopologyManager or None, got {got}; name other things extra=")


def _check(
    saved: Any,
    model: nn.Module,
    optimizers: list[Any],
    manager: TopologyManager | None,
    override: Iterable[str],
    wrapper: str,
) -> None:
    """Checks all of ``saved`` that will be loaded, and renames in it what an older version named otherwise."""
    required = ("layouts", "model", "optimizer", "manager", "random", "extra")
    check_keys("checkpoint", saved, required, ("model_metadata", "other_optimizers"))
    if not isinstance(saved.get("other_optimizers", []), list):
        raise ValueError(f"other_optimizers: expected a list, got {kind_of(saved['other_optimizers'])}")
    for part in ("layouts", "model"):
        if not isinstance(saved[part], dict):
            raise ValueError(f"{part}: expected a dict, got {kind_of(saved[part])}")
    _rename(saved, renaming(saved["model"], model))
    check_model(saved["model"], saved["layouts"], saved.get("model_metadata"), model)
    if optimizers:
        entries = _entries(saved)
        if len(entries) != len(optimizers):
            names = ", ".join(type(each).__name__ for each in optimizers)
            raise ValueError(
                f"expected the state of {len(optimizers)} optimizers ({names}), got that of {len(entries)}; resume "
                "with the optimizer that was saved, in the same wrappers"
            )
        for entry, each in zip(entries, optimizers, strict=True):
            _check_optimizer(entry, model, each, wrapper)
        check_random_states(saved["random"])
    if manager is not None:
        if saved["manager"] is None:
            raise ValueError("expected a checkpoint with a manager, got one saved without; leave it out")
        manager.check_state_dict(saved["manager"], override=override)


def _rename(saved: dict[str, Any], rename: Rename) -> None:
    """Gives every weight its canonical name, wherever a checkpoint names one."""
    saved["model"] = _renamed(saved["model"], rename)
    saved["layouts"] = _renamed(saved["layouts"], rename)
    for entry in _entries(saved):
        match entry:
            case {"names": list(groups)}:
                entry["names"] = [
                    [rename(name) if isinstance(name, str) else name for name in group]
                    if isinstance(group, list)
                    else group
                    for group in groups
                ]
    match saved["manager"]:
        case {"trace": {"explored": dict(), "grown": dict()} as trace, "history": list(history)}:
            saved["manager"]["trace"] = {part: _renamed(bits, rename) for part, bits in trace.items()}
            for event in history:
                match event:
                    case {"sites": dict(sites)}:
                        event["sites"] = _renamed(sites, rename)


def _renamed(entries: Any, rename: Rename) -> Any:
    renamed = {rename(name) if isinstance(name, str) else name: value for name, value in entries.items()}
    if len(renamed) != len(entries):
        raise ValueError(
            "the checkpoint is of a model in wrappers that this one does not have; wrap it in the same way"
        )
    return renamed


def _entries(saved: dict[str, Any]) -> list[Any]:
    """Returns what was saved of each optimizer: the outermost, then those that it wraps or that were given with it."""
    return [saved["optimizer"], *saved.get("other_optimizers", [])]


def _optimizer_entry(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    state = optimizer.state_dict()
    return {
        "class": type(optimizer).__name__,
        "names": _names(model, optimizer),
        "with_state": numbers_with_state(state),
        "state": state,
    }


def _load_optimizers(optimizers: list[Any], states: list[Any]) -> None:
    """Loads each; those that shared their parameter groups share them afterwards, as a scheduler expects."""
    groups = [optimizer.param_groups for optimizer in optimizers]
    for optimizer, state in reversed(list(zip(optimizers, states, strict=True))):
        optimizer.load_state_dict(state)
    for i, optimizer in enumerate(optimizers):
        same = next((j for j in range(i) if groups[j] is groups[i]), None)
        if same is not None:
            optimizer.param_groups = optimizers[same].param_groups


def _names(model: nn.Module, optimizer: Optimizer) -> list[list[str | None]]:
    """The parameters of each group by name."""
    names = {id(p): canonical_name(model, name) for name, p in model.named_parameters()}
    return [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]


def _check_optimizer(saved: Any, model: nn.Module, optimizer: Optimizer, wrapper: str) -> None:
    """Older versions wrote the class of the wrapper."""
    check_keys("optimizer", saved, ("class", "names", "state"), ("with_state",))
    if saved["class"] not in (type(optimizer).__name__, wrapper):
        raise ValueError(
            f"expected the state of {type(optimizer).__name__}, got that of {saved['class']!r:.80}; resume with the "
            "optimizer that was saved"
        )
    if saved["names"] != _names(model, optimizer):
        raise ValueError("the checkpoint's optimizer holds other parameters or groups; make it alike")
    state = saved["state"]
    check_optimizer_state(optimizer, state)
    ours = optimizer.state_dict()
    if has_usual_parts(ours):
        numbers = [group["params"] for group in ours["param_groups"]]
        if [group["params"] for group in state["param_groups"]] != numbers:
            raise ValueError(f"param_groups: expected the parameters {numbers!r:.80}, got them in another order")
    with_state = saved.get("with_state", numbers_with_state(state))
    if not isinstance(with_state, list) or {*map(repr, with_state)} != {*map(repr, numbers_with_state(state))}:
        raise ValueError("expected the optimizer's state of all parameters that were trained, some is missing")
