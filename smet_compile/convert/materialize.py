"""Draws the weights of a model that was made sparse on shapes alone, one dense weight at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from smet_compile.convert.active_blocks import FROM_MASKS
from smet_compile.convert.stand_ins import StandIns, whole_parameters
from smet_compile.format import arguments
from smet_compile.ops import Site, find_sites
from smet_compile.ops.sites import check_sparsified, holders_of
from smet_compile.shards import DrawsWhole, Rows, has_shards, is_nonzero, is_sharded, local

Model = TypeVar("Model", bound=nn.Module)
Initialize = Callable[[nn.Module], None]
_RESETS = ("reset_parameters", "_reset_parameters")


@torch.no_grad()
def materialize(
    model: Model,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    initialize: Initialize | None = None,
) -> Model:
    """Gives a model without data its first weights and topologies: after ``sparsify`` on the meta device, in place.

    Every module's parameters are drawn by its ``reset_parameters``, and then by ``_init_weights`` of the Hugging Face
    model that it is part of; a compact weight is dense only while its own module is drawn. The result is that of
    ``torch.manual_seed(seed)``, construction and ``sparsify(..., seed=seed)`` on the device itself, bit for bit where
    the constructors draw by these methods alone, in the order in which modules are registered::

        with torch.device("meta"):
            model = Model(config)
        smet.sparsify(model, density=0.1)
        smet.materialize(model, device="cuda", seed=0)

    A model that no machine could hold is sharded in between: ``fully_shard(...)`` after ``sparsify``. Every rank draws
    the same numbers, one module at a time, and keeps its rows, so that any number of ranks gets the model above.

    Args:
        model: a model with compact weights, on the meta device or after ``to_empty``, which parts tied weights.
        seed: the seed of weights and topologies; the random state of torch is put back.
        device: where the model goes from the meta device; default: the device of the mesh on which it is sharded, else
            torch's default device.
        initialize: takes a module and writes its own parameters and buffers, in place of the methods above.

    Returns: ``model``.

    Raises:
        ValueError: a model without compact weights, or with weights that have data; afterwards, a parameter or buffer
            that nothing has written.
    """
    arguments.module("materialize", model)
    seed = arguments.seed_number("seed", seed)
    if initialize is not None:
        arguments.function("initialize", initialize, "of a module")
    device = None if device is None else data_device(device)
    sites = find_sites(model)
    check_sparsified("materialize", model)
    for name, site in sites.items():
        if site.compact.has_data():
            raise ValueError(f"{name}: expected a weight without data, got one that has a topology; load a state dict")
        if site.compact.select == FROM_MASKS:
            raise ValueError(f"{name}: expected a topology to draw, got one that masks gave; load a state dict")
    if any(tensor.is_meta for tensor in _tensors(model)):
        _to_empty(model, _default_device(model) if device is None else device)
    try:
        _draw_all(model, sites, seed, initialize)
    except BaseException:
        for site in sites.values():
            site.compact.fingerprint = None  # there is no data still, and it can be called again
        raise
    return model


@torch.no_grad()
def allocate(model: nn.Module, device: torch.device | None) -> None:
    """Gives a model on the meta device memory that nobody has written yet, on ``device``, by default as materialize."""
    _to_empty(model, _default_device(model) if device is None else device)


@torch.no_grad()
def fill_unsaved_buffers(model: nn.Module) -> None:
    """Computes the buffers that no state dict holds, for a model that was allocated and loaded.

    Their modules are initialised anew, as ``materialize`` does, parameters included: the state dict has to be loaded
    once more.

    Raises:
        ValueError: a buffer that no ``reset_parameters`` and no ``_init_weights`` writes.
    """
    lists = {id(site.compact.lists) for site in find_sites(model).values()}
    saved = model.state_dict().keys()
    unsaved = {n: b for n, b in model.named_buffers() if n not in saved and id(b) not in lists and b.numel() > 0}
    for buffer in unsaved.values():
        _mark(buffer)
    owners = {model.get_submodule(name.rpartition(".")[0]) for name in unsaved}
    with torch.random.fork_rng():
        for initializer, module in _initializers(model):
            if module in owners:
                initializer(module)
    buffers = dict(model.named_buffers())  # some are replaced
    _expect_written([(name, buffers[name]) for name in unsaved], {}, "buffers that no state dict holds")


def data_device(device: torch.device | str) -> torch.device:
    """Returns ``device`` with its index. Raises ValueError for one that this machine lacks, or that holds no data."""
    try:
        tensor = torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device: expected one of this machine, got {arguments.described(device)} ({reason})"
        ) from error
    if tensor.is_meta:
        raise ValueError("device: expected one that holds data, got meta; pass cpu or cuda")
    return tensor.device


def _default_device(model: nn.Module) -> torch.device:
    shards: list[Any] = [parameter for parameter in model.parameters() if is_sharded(parameter)]
    return torch.device(shards[0].device_mesh.device_type) if shards else torch.get_default_device()


def _to_empty(model: nn.Module, device: torch.device) -> None:
    """Gives the model memory on ``device``. Parameters that are tied stay so: ``to_empty`` alone would part them."""
    holders = holders_of(model)
    model.to_empty(device=device)
    for (first, first_name), *others in holders.values():
        for module, name in others:
            module._parameters[name] = first._parameters[first_name]


def _draw_all(model: nn.Module, sites: dict[str, Site], seed: int, initialize: Initialize | None) -> None:
    unwritten = _mark_unwritten(model, sites)
    initializers = (
        _initializers(model) if initialize is None else ((initialize, module) for module in _children_first(model))
    )
    stand_ins = StandIns(seed)
    draws = DrawsWhole() if has_shards(model) else nullcontext()
    with torch.random.fork_rng(), draws, stand_ins.of(sites.values()):
        torch.manual_seed(seed)
        for initializer, module in initializers:
            with whole_parameters(module):
                initializer(module)
            stand_ins.keep()
    now = dict((*model.named_parameters(), *model.named_buffers()))  # an initialiser may replace a buffer
    _expect_written([(name, now.get(name, tensor)) for name, tensor in unwritten], sites, "materialize")


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _children_first(model: nn.Module) -> Iterator[nn.Module]:
    """Yields modules in the order in which their constructors end, but for the insides of parametrizations."""
    seen: set[int] = set()

    def visit(module: nn.Module) -> Iterator[nn.Module]:
        if id(module) in seen:
            return
        seen.add(id(module))
        for name, child in module.named_children():
            if name != "parametrizations":
                yield from visit(child)
        yield module

    return visit(model)


def _reset(module: nn.Module) -> None:
    for name in _RESETS:
        if callable(reset := getattr(module, name, None)):
            reset()
            return


def _initializers(model: nn.Module) -> Iterator[tuple[Initialize, nn.Module]]:
    """Yields each module with the function that draws it, in the order in which constructors call these.

    A Hugging Face model ends its constructor with ``_init_weights`` on every part that no inner model has initialised.
    """
    initialised: set[int] = set()
    for module in _children_first(model):
        yield _reset, module
        init_weights = getattr(module, "_init_weights", None)
        if callable(init_weights):
            for part in _children_first(module):
                if id(part) not in initialised:
                    initialised.add(id(part))
                    yield init_weights, part


def _mark_unwritten(model: nn.Module, sites: dict[str, Site]) -> list[tuple[str, Tensor]]:
    """Fills every plain tensor with a mark that no initialisation writes; returns the tensors with their names."""
    compact = {id(site.values) for site in sites.values()}
    compact |= {id(buffer) for site in sites.values() for buffer in site.compact.buffers()}
    marked = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in compact and tensor.numel() > 0:
            _mark(local(tensor))
            marked.append((name, tensor))
    return marked


_BOOL_MARK = 0xA5
"""Is the byte of a truth value that nothing wrote: torch writes 0 and 1."""


def _unwritten_mark(dtype: torch.dtype) -> float:
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    limits = torch.iinfo(dtype)
    return limits.min if limits.min < 0 else limits.max


def _mark(tensor: Tensor) -> None:
    if tensor.dtype == torch.bool:
        tensor.view(torch.uint8).fill_(_BOOL_MARK)
    else:
        tensor.fill_(_unwritten_mark(tensor.dtype))


def _is_unwritten(tensor: Tensor) -> bool:
    """Tells whether a mark is left; of whole numbers, which may be the mark, whether all are. Every rank has to ask."""
    if tensor.dtype == torch.bool:
        found = (local(tensor).view(torch.uint8) == _BOOL_MARK).any().to(torch.int64)
        return bool(Rows.of(tensor).sum_(found))
    mark = _unwritten_mark(tensor.dtype)
    return is_nonzero(tensor.isnan()) if math.isnan(mark) else not is_nonzero(tensor != mark)


def _expect_written(marked: Iterable[tuple[str, Tensor]], sites: dict[str, Site], where: str) -> None:
    names = [name for name, site in sites.items() if not site.compact.has_data()]
    names += [name for name, tensor in marked if _is_unwritten(tensor)]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"{where}: {', '.join(names[:3])}{more} were written by no reset_parameters and no _init_weights; pass "
            "initialize= to smet_compile.materialize, a function of a module, or load into a model with data"
        )
