"""save_checkpoint and load_checkpoint: stop a run and continue it in another process, bit for bit."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from smet_compile.format import arguments
from smet_compile.ops import canonical_name, find_sites, following
from smet_compile.ops.loaded import check_keys, check_tensor, kind_of
from smet_compile.ops.optimizers import find_optimizers, state_holders
from smet_compile.ops.torch_insides import replace_data
from smet_compile.runtime import checkpoint_file
from smet_compile.runtime.auto_step import manager_that_steps
from smet_compile.runtime.in_optimizer import managers_left_out
from smet_compile.runtime.manager import TopologyManager
from smet_compile.runtime.parts import join_parts, split_parts
from smet_compile.runtime.saved_correction import check_correction, correction_entries, restore_correction
from smet_compile.runtime.saved_stage import check_state_is_loaded, find_resized, resize_as_saved
from smet_compile.runtime.saved_state import (
    check_model,
    check_optimizer,
    layouts_of,
    load_optimizers,
    loadable,
    model_entries,
    model_metadata,
    optimizer_entry,
)
from smet_compile.runtime.settings import check_override
from smet_compile.runtime.tree import as_bytes
from smet_compile.shards import local, reshard

_WRAPPED_CHILDREN = ("_orig_mod", "_checkpoint_wrapped_module")
"""Names that wrappers of torch give to the module in them, as older versions wrote them into files."""
_MT19937_BYTES, _MT19937_WORDS = 5056, 624
_LEFT, _NEXT = slice(8, 12), slice(16, 24)
"""Bytes of the state of torch's Mersenne twister: the words that are left, and the place of the next one."""


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    manager: TopologyManager | None = None,
    extra: Any = None,
) -> None:
    """Writes the run to one file, atomically: either the new checkpoint is there whole, or the old one.

    Args:
        path: the file (its folder is made).
        model: as it is between two steps.
        optimizer: as it is then. Each optimizer inside a wrapper or a list is saved with its own state.
        manager: as it is then. One that steps by itself is found, and need not be given.
        extra: anything else that the run needs, such as a scheduler's ``state_dict()``: nested dicts, lists and
            tuples of numbers, strings and tensors.

    torch's random states are saved too. A model that ``torch.compile`` or data parallelism wraps is saved under the
    names of the plain one. Where it is sharded, every rank calls this, and the file is the one that a single process
    would write, but for the random states, which are the first rank's. Under ``DistributedDataParallel`` the gradients
    that policies collect before an update are those of the rank that saves. Raises ValueError where the file cannot be
    written, or cannot hold a value exactly.
    """
    _check_arguments("save_checkpoint", path, model, optimizer, manager)
    reshard(model)
    manager = manager or manager_that_steps(model)
    with managers_left_out():
        first, *others = [optimizer_entry(model, each) for each in state_holders(optimizer, model.parameters())]
    saved = {
        "layouts": layouts_of(model),
        "model": model_entries(model),
        "model_metadata": model_metadata(model),
        "correction": correction_entries(model),
        "optimizer": first,
        "other_optimizers": others,
        "manager": None if manager is None else manager.state_dict(),
        "random": random_states(),
        "extra": extra,
    }
    checkpoint_file.write(path, join_parts(model, saved))


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    manager: TopologyManager | None = None,
    *,
    override: Iterable[str] = (),
) -> Any:
    """Loads what ``save_checkpoint`` wrote into a model made sparse in the same way; returns ``extra``.

    Parameters keep their storage, so an optimizer or a compiled model that holds them goes on: moments and ages stay
    with their weights, and weights that were not active get new ones. A manager with a ``density_schedule`` first
    brings weights to the number of blocks that they have in the file. With an optimizer given, its state and torch's
    random states are restored as well, and the run continues as if never stopped. What
    ``correct_gradients`` decided is restored too. Where it was called for this model before and decided otherwise, that
    stays, with a warning.

    Args:
        path: the file.
        model: made sparse as the saved one was.
        optimizer: None to load the weights alone.
        manager: one that steps by itself is found, and need not be given where an optimizer is.
        override: names of the manager's settings (``"total_steps"``, ``"every"``, ...) that may differ from those of
            the saved run, which then goes on with this manager's.

    Raises:
        ValueError: the file is not whole, was altered, has a newer format, or is of another model, block shape,
            optimizer or manager, or holds a value that no run has. Nothing in memory has then changed.
    """
    _check_arguments("load_checkpoint", path, model, optimizer, manager)
    reshard(model)
    saves_none = manager is None
    if saves_none and optimizer is not None:
        manager = manager_that_steps(model)
    if check_override(override) and manager is None:
        raise ValueError("override: expected a manager whose settings differ, got none; pass manager=")
    saved = checkpoint_file.read(path)
    holders = [] if optimizer is None else state_holders(optimizer, model.parameters())
    with ExitStack() as stack:
        stack.enter_context(managers_left_out())
        try:
            _read_names(saved, model)
            if saves_none and saved["manager"] is None:
                manager = None
            if manager is not None and manager.settings["density_schedule"] is not None:
                stack.enter_context(_in_saved_stage(saved["model"], model, holders, manager))
            saved = split_parts(model, saved)
            check_model(saved["model"], saved["layouts"], saved.get("model_metadata"), model)
            check_correction(saved.get("correction", {}), model)
            if holders:
                _check_optimizers(saved, model, holders, type(optimizer).__name__)
            if manager is not None:
                if saved["manager"] is None:
                    raise ValueError("expected a checkpoint with a manager, got one saved without; leave it out")
                manager.check_state_dict(saved["manager"], override=override)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        warning = None
        try:
            with all_or_nothing(model, holders, manager):
                model.load_state_dict(loadable(saved["model"], saved.get("model_metadata"), model))
                if holders:
                    load_optimizers(holders, [entry["state"] for entry in _optimizer_entries(saved)])
                    restore_random_states(saved["random"])
                if manager is not None:
                    manager.load_state_dict(saved["manager"], override=override)
                if "correction" in saved:  # older versions did not save it
                    warning = restore_correction(saved["correction"], model)
        except Exception as error:
            raise ValueError(f"{path}: could not be loaded ({error}); everything is as it was before") from error
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
    return saved["extra"]


def _check_arguments(function: str, path: Any, model: Any, optimizer: Any, manager: Any) -> None:
    arguments.path(f"{function}: path", path)
    arguments.module(f"{function}: model", model)
    given = optimizer is not None or function == "save_checkpoint"
    if given and not find_optimizers(optimizer, model.parameters()):
        arguments.optimizer(f"{function}: optimizer", optimizer)
    if manager is not None and not isinstance(manager, TopologyManager):
        got = arguments.described(manager)
        raise ValueError(
            f"{function}: manager: expected a TopologyManager or None, got {got}; name other things extra="
        )


def _read_names(saved: dict[str, Any], model: nn.Module) -> None:
    """Checks which parts a checkpoint has, and renames what an older version named otherwise."""
    required = ("layouts", "model", "optimizer", "manager", "random", "extra")
    check_keys("checkpoint", saved, required, ("model_metadata", "other_optimizers", "correction"))
    if not isinstance(saved.get("other_optimizers", []), list):
        raise ValueError(f"other_optimizers: expected a list, got {kind_of(saved['other_optimizers'])}")
    for part in ("layouts", "model"):
        if not isinstance(saved[part], dict):
            raise ValueError(f"{part}: expected a dict, got {kind_of(saved[part])}")
    _rename(saved, _renaming(saved["model"], model))


def _check_optimizers(saved: dict[str, Any], model: nn.Module, optimizers: list[Any], wrapper: str) -> None:
    entries = _optimizer_entries(saved)
    if len(entries) != len(optimizers):
        names = ", ".join(type(each).__name__ for each in optimizers)
        raise ValueError(
            f"expected the state of {len(optimizers)} optimizers ({names}), got that of {len(entries)}; resume with "
            "the optimizer that was saved, in the same wrappers"
        )
    for entry, each in zip(entries, optimizers, strict=True):
        check_optimizer(entry, model, each, wrapper)
    check_random_states(saved["random"])


def _optimizer_entries(saved: dict[str, Any]) -> list[Any]:
    """Returns the saved optimizers: the outermost, then those that it wraps or that were given with it."""
    return [saved["optimizer"], *saved.get("other_optimizers", [])]


def _renaming(saved_names: Iterable[str], model: nn.Module) -> Callable[[str], str]:
    """Returns the function that turns the names in a file into canonical ones.

    A file of an older version has the names that the model had with its wrappers. If this model is wrapped in the same
    way, it has these names too; else the parts of them that wrappers add are left out.
    """
    names, raw = set(saved_names), list(model.state_dict())
    known = {canonical_name(model, name) for name in raw}
    if names == set(raw) != known:
        return partial(canonical_name, model)
    return partial(_known_as, known | find_sites(model).keys())


def _known_as(known: set[str], name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPED_CHILDREN]
    for candidate in (name, ".".join(parts), ".".join(parts[1:]) if parts[0] == "module" else name):
        if candidate in known:
            return candidate
    return name


def _rename(saved: dict[str, Any], rename: Callable[[str], str]) -> None:
    """Gives every weight its canonical name, wherever a checkpoint names one."""
    saved["model"] = _renamed(saved["model"], rename)
    saved["layouts"] = _renamed(saved["layouts"], rename)
    if isinstance(saved.get("correction"), dict):
        saved["correction"] = _renamed(saved["correction"], rename)
    for entry in _optimizer_entries(saved):
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


def _renamed(entries: Any, rename: Callable[[str], str]) -> Any:
    renamed = {rename(name) if isinstance(name, str) else name: value for name, value in entries.items()}
    if len(renamed) != len(entries):
        raise ValueError(
            "the checkpoint is of a model in wrappers that this one does not have; wrap it in the same way"
        )
    return renamed


@contextmanager
def _in_saved_stage(
    saved: dict[str, Any], model: nn.Module, optimizers: list[Any], manager: TopologyManager
) -> Iterator[None]:
    """Brings model and optimizers to the density stage of a checkpoint; back, if the block raises."""
    resized = find_resized(saved, model)
    if not optimizers:
        check_state_is_loaded(resized, manager.optimizers)
    with all_or_nothing(model, optimizers, manager) if resized else nullcontext():
        resize_as_saved(resized, optimizers)
        yield


@contextmanager
def all_or_nothing(model: nn.Module, optimizers: list[Any], manager: TopologyManager | None) -> Iterator[None]:
    """Puts everything that the block changed back, in the same tensors, if the block raises.

    The model's tensors are copied to the CPU meanwhile, since loading writes into them. References are enough for the
    optimizers and for gradients, since loading replaces what they hold.
    """
    tensors = [(tensor, local(tensor).detach().to("cpu", copy=True)) for tensor in _tensors_of(model)]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    extra = [(module, copy.deepcopy(module.get_extra_state())) for module in model.modules() if _has_extra(module)]
    of_optimizers = (entries for optimizer in optimizers for entries in _optimizer_dicts(optimizer))
    of_manager = [] if manager is None else manager.parts_of_state()
    references = [*_compact_dicts(model), *of_optimizers, *of_manager]
    before = [dict(entries) for entries in references]
    random = random_states()
    with following.deferred():
        try:
            yield
        except BaseException:
            for entries, content in zip(references, before, strict=True):
                entries.clear()
                entries.update(content)
            _restore(tensors)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for module, state in extra:
                module.set_extra_state(state)
            restore_random_states(random)
            raise


@torch.no_grad()
def _restore(tensors: list[tuple[Tensor, Tensor]]) -> None:
    """Writes only where something changed: not every buffer can be written to."""
    for tensor, before in tensors:
        here = local(tensor)
        if here.shape != before.shape:
            replace_data(tensor, before.to(tensor.device))
        elif as_bytes(here.detach().cpu().contiguous()) != as_bytes(before.contiguous()):
            here.copy_(before)


def _tensors_of(model: nn.Module) -> list[Tensor]:
    """Returns parameters and buffers, derived ones included, each once; a meta tensor has nothing to copy."""
    found = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return [tensor for tensor in found.values() if not tensor.is_meta]


def _has_extra(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _compact_dicts(model: nn.Module) -> Iterator[dict[Any, Any]]:
    """Yields the attributes of each compact weight, which notes the topology of its values, and the dicts in them.

    One of these dicts holds its buffers.
    """
    for site in find_sites(model).values():
        attributes = vars(site.compact)
        yield from (attributes, *(value for value in attributes.values() if isinstance(value, dict)))


def _optimizer_dicts(optimizer: Any) -> list[dict[Any, Any]]:
    """Returns dicts that loading changes, or in whose place it puts others."""
    return [optimizer.__dict__, optimizer.state, *optimizer.state.values(), *optimizer.param_groups]


def random_states() -> dict[str, Any]:
    """Returns the state of the CPU's generator, and those of all GPUs where this process uses any."""
    uses_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if uses_cuda else []}


def restore_random_states(states: dict[str, Any]) -> None:
    """Restores what ``random_states`` returned; GPU states only where there are as many GPUs."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"] and _are_of_these_gpus(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])


def check_random_states(states: Any) -> None:
    """Raises ValueError where ``states`` cannot be restored. Tries each on a generator of its own."""
    check_keys("random", states, ("cpu", "cuda"))
    _try("random.cpu", states["cpu"], torch.Generator())
    _check_place_in_table(states["cpu"])
    if not isinstance(states["cuda"], list):
        raise ValueError(f"random.cuda: expected a list of states, got {type(states['cuda']).__name__}")
    for i, state in enumerate(states["cuda"]):
        where = f"random.cuda.{i}"
        if _are_of_these_gpus(states["cuda"]):
            _try(where, state, torch.Generator(f"cuda:{i}"))
        elif not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
            raise ValueError(f"{where}: expected a vector of bytes, got something else")


def _are_of_these_gpus(states: list[Any]) -> bool:
    return torch.cuda.is_available() and len(states) == torch.cuda.device_count()


def _try(where: str, state: Any, scratch: torch.Generator) -> None:
    check_tensor(where, state, torch.uint8, tuple(scratch.get_state().shape))
    try:
        scratch.set_state(state)
    except RuntimeError as error:
        raise ValueError(f"{where}: expected the state of a generator, got another ({error})") from error


def _check_place_in_table(state: Tensor) -> None:
    """Checks that the two counts of a Mersenne twister lead to a place in its table; torch checks them one by one."""
    if state.numel() == _MT19937_BYTES:
        data = bytes(state.tolist())
        left, upcoming = (int.from_bytes(data[part], "little") for part in (_LEFT, _NEXT))
        if left + upcoming > _MT19937_WORDS + 1:
            raise ValueError(
                f"random.cpu: expected a place within the generator's {_MT19937_WORDS} words, got {upcoming} with "
                f"{left} left"
            )
