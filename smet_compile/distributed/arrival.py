"""Completes a run in its new layout, or puts everything back where some rank cannot."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.distributed import streams
from smet_compile.distributed.agreement import together
from smet_compile.distributed.generation import forget_graphs
from smet_compile.distributed.layout import buffer_name, plain_buffers
from smet_compile.distributed.run import Prepared, Run, data_rank
from smet_compile.distributed.space import Item
from smet_compile.distributed.taken import Note, Taken, names_of, parameters_of, reason_to_stay
from smet_compile.distributed.transfer import Transfer, Way
from smet_compile.ops import canonical_name, find_sites
from smet_compile.ops.sites import holders_of
from smet_compile.shards import Rows, is_sharded, unwrap


def finish(
    prepared: Prepared, note: Note, arrived: dict[str, Tensor], states: Mapping[int, streams.Stream], taken: Taken
) -> Run | None:
    """Makes the run of a new layout, on every rank or on none; each of the default process group has to call.

    Args:
        arrived: what this rank is to store, by the names of items.
        states: the streams of the run so far, by share of the data.
        taken: the run so far.

    Returns: None on a rank that takes no part in the new layout.

    Raises:
        ValueError: it cannot be made on some rank; the same on all of them.
    """
    device = torch.device(prepared.mesh.device_type)
    model = prepared.model
    if model is not None:
        note = replace(note, manager=_manager_state(note, states, *data_rank(prepared.mesh)))
    made = together(lambda: None if model is None else _optimized(prepared, model, note, arrived), device)
    run = together(lambda: None if made is None else prepared.wrapped(made), device)
    try:
        together(lambda: None if run is None else streams.resume(states, *data_rank(run.mesh), run.others), device)
    except ValueError:
        _resume_shared(run, taken)
        raise
    return run


def _optimized(prepared: Prepared, model: nn.Module, note: Note, arrived: dict[str, Tensor]) -> Run:
    forget_graphs()
    fill_model(model, note, arrived)
    run = prepared.optimized(model)
    wrong = reason_to_stay(run)
    if wrong:
        raise ValueError(f"optimize: {wrong}")
    if (run.manager is None) != (note.manager is None):
        wanted, got = ("no manager", "one") if note.manager is None else ("a manager", "None")
        raise ValueError(f"optimize: expected {wanted} as in the run, got {got}; make them alike")
    note.modes.give(model, run.optimizers)
    fill_optimizers(run, note, arrived)
    if run.manager is not None and note.manager is not None:
        run.manager.load_state_dict(note.manager)
    return run


def _manager_state(note: Note, states: Mapping[int, streams.Stream], number: int, count: int) -> dict[str, Any] | None:
    """Returns the manager's state, with the gradients that this share of the data had collected where it stays."""
    own = states[number].collected if len(states) == count else None
    return note.manager if note.manager is None or own is None else note.manager | {"collected": own}


def _resume_shared(run: Run | None, taken: Taken) -> None:
    """Gives further objects that are those of the run so far, too, its state again."""
    if run is None or taken.stream is None:
        return
    for name, each in run.others.items():
        if name in taken.others and taken.others[name] is each:
            with contextlib.suppress(Exception):  # it may be what failed, and the reason is known
                each.load_state_dict(taken.stream.others[name])


def put_back(
    items: list[Item], moved: dict[str, Tensor], taken: Taken, device: Any, chunk_bytes: int, way: Way
) -> None:
    """Moves the tensors of a run back into the memory from which they went; every rank has to call.

    Args:
        moved: what this rank stores in the new layout, by the names of items; it is used up.
    """

    def free(name: str) -> None:
        moved.pop(name).untyped_storage().resize_(0)

    back = [replace(item, source=item.target, target=item.source) for item in items]
    Transfer(back, device, moved.get, taken.restore, free, way).run(chunk_bytes)


def fill_model(model: nn.Module, note: Note, arrived: dict[str, Tensor]) -> None:
    """Gives a model on the meta device its parameters, buffers and topologies."""
    holders = holders_of(model)
    for name, parameter in list(model.named_parameters()):
        _, rewrap = unwrap(parameter.detach())
        here = arrived.pop(canonical_name(model, name))
        shaped = rewrap(here) if is_sharded(parameter) else here.view(parameter.shape)
        filled = nn.Parameter(shaped, parameter.requires_grad)
        for module, leaf in holders[parameter]:
            module._parameters[leaf] = filled
    buffers: dict[str, Tensor] = {}
    for name, (module, leaf), buffer in list(plain_buffers(model)):
        here = arrived.pop(buffer_name(name)).view(buffer.shape)
        module._buffers[leaf] = buffers[name] = buffers[note.tied[name]] if name in note.tied else here
    for name, site in find_sites(model).items():
        bits = note.bits[name] if site.part is None else site.part.bits_here(note.bits[name])
        site.compact.topology = bits.to(site.values.device)


def fill_optimizers(run: Run, note: Note, arrived: dict[str, Tensor]) -> None:
    """Gives new optimizers the state of the run, and its parameter groups with their options."""
    names = names_of(run.model)
    _add_groups(run, note.groups)
    for optimizer, saved in zip(run.optimizers, note.groups, strict=True):
        for group, options in zip(optimizer.param_groups, saved, strict=True):
            group.update({key: value for key, value in options.items() if key != "params"})
        for parameter in parameters_of(optimizer):
            name, rows = names[id(parameter)], Rows.of(parameter)
            state = {key: each.on(parameter.device) for key, each in note.small[name].items()}
            if not rows.are_first and "num_skipped" in state:  # the first rank's count is that of all
                state["num_skipped"].zero_()
            for key in note.tensors[name].state:
                state[key] = rows.wrap(parameter, arrived.pop(f"{name}/{key}"))
            if state:
                optimizer.state[parameter] = state


def _add_groups(run: Run, groups: list[list[dict[str, Any]]]) -> None:
    """Adds the groups that the run got after its start, as where a layer was unfrozen.

    Raises:
        ValueError: the groups of the new optimizers are not the first ones of the run, in order.
    """
    names = names_of(run.model)
    by_name = {names[id(parameter)]: parameter for parameter in run.model.parameters()}
    own = [[[names[id(p)] for p in group["params"]] for group in each.param_groups] for each in run.optimizers]
    held = {name for of_optimizer in own for group in of_optimizer for name in group}
    further = [saved[len(mine) :] for mine, saved in zip(own, groups, strict=False)]
    starts = [[group["params"] for group in saved[: len(mine)]] for mine, saved in zip(own, groups, strict=False)]
    added = [name for of_optimizer in further for group in of_optimizer for name in group["params"]]
    if len(own) != len(groups) or own != starts or held & set(added):
        raise ValueError(
            f"optimize: expected the parameter groups of the run, got others ({_sizes(own)} instead of "
            f"{_sizes(groups)}); make them alike, but for those that add_param_group added at the end"
        )
    for optimizer, of_optimizer in zip(run.optimizers, further, strict=True):
        for group in of_optimizer:
            optimizer.add_param_group(group | {"params": [by_name[name] for name in group["params"]]})


def _sizes(groups: list[list[Any]]) -> str:
    """Says how many parameters each group of each optimizer holds."""
    counts = [[len(group["params"] if isinstance(group, dict) else group) for group in each] for each in groups]
    return " and ".join(f"{', '.join(map(str, each))} parameters" for each in counts)
