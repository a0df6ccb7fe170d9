"""Exports a model with compact weights as a plain dense model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from smet_compile.convert.export_layouts import EXPORT_LAYOUTS, Exported, ExportLayout, convert
from smet_compile.convert.pretrained import forget_names
from smet_compile.convert.report import forget_reasons
from smet_compile.format import arguments
from smet_compile.ops import find_sites, reads, saved_weights, shared_class
from smet_compile.ops.plain_copy import plain_copy, whole_weight
from smet_compile.ops.sites import check_sparsified, without_wrappers
from smet_compile.shards import has_shards, make_whole, reshard

Model = TypeVar("Model", bound=nn.Module)


@overload
def export_dense(model: DataParallel[Model], layout: ExportLayout | None = None, *, keep: bool = True) -> Model: ...


@overload
def export_dense(
    model: DistributedDataParallel, layout: ExportLayout | None = None, *, keep: bool = True
) -> nn.Module: ...


@overload
def export_dense(model: Model, layout: ExportLayout | None = None, *, keep: bool = True) -> Model: ...


@torch.no_grad()
def export_dense(model: nn.Module, layout: ExportLayout | None = None, *, keep: bool = True) -> nn.Module:
    """Returns a plain copy of ``model``: dense weights, zero where inactive, no trace of this library.

    ``model`` itself stays compact and trainable. For a Hugging Face model, ``save_pretrained`` of the copy
    loads anywhere. Takes the memory of the dense weights.

    The copy is of the module itself where ``model`` or a module in it is wrapped by ``torch.compile`` or by data
    parallelism. A tensor that a module keeps together with its graph (a loss, a recurrent state) is copied detached.

    The copy of a model that ``fully_shard`` has cut is a plain one on the CPU. Every rank has to call, since one weight
    after the other is gathered from all of them.

    Args:
        layout: None for dense weights; else the weights of ``nn.Linear`` that were compact become tensors that
            ``F.linear`` takes, without gradients: "csr" or "bsr" (blocks as in the model) for torch's sparse tensors;
            "2:4" on a GPU for those of ``torch.sparse.to_sparse_semi_structured``, in float16 or bfloat16. Elsewhere
            "2:4" leaves them dense and checks that this function will take them: at most two nonzero weights in every
            four along a row, and multiples of 32 rows and 64 columns. Other weights stay dense, with a warning.
        keep: whether the copy holds data. False makes it one on the meta device, which takes no memory: of a sharded
            model, ``keep=rank == 0`` leaves the dense weights with one rank alone. ``layout`` is then not looked at.

    Raises:
        ValueError: no model, or one that was never made sparse; a weight that ``layout`` does not allow.
    """
    arguments.module("export_dense", model)
    if layout is not None:
        arguments.one_of("layout", layout, EXPORT_LAYOUTS)
    keep = arguments.flag("keep", keep)
    model = without_wrappers(model)
    check_sparsified("export_dense", model)
    reads.settle_live()
    reshard(model)
    dense = plain_copy(model, _tensors_of_copy(model, keep))
    exported = []
    for name, site in find_sites(dense).items():
        order = site.compact.parameter_order
        exported.append(Exported(name, site.module, site.tensor_name, site.layout))
        shared_class.make_plain(site.module, site.tensor_name)
        _restore_order(site.module, order)
    for module in dense.modules():
        saved_weights.uninstall(module)
        forget_reasons(module)
    forget_names(dense)
    if layout is not None and keep:
        convert(exported, layout)
    return dense


def _tensors_of_copy(model: nn.Module, keep: bool) -> dict[int, Any]:
    """Returns parameters and buffers of the copy by the id of the original, and compact weights that are cut.

    There are none where plain copies will do.

    One parameter at a time is gathered on the device. Every rank gathers each of them, whatever it keeps.
    """
    sharded = has_shards(model)
    if keep and not sharded:
        return {}
    found: dict[int, Any] = {}
    orders: dict[int, Callable[[Tensor], Tensor]] = {}
    for site in find_sites(model).values():
        if site.part is not None:
            bits = site.part.bits_of_all(site.compact.topology)
            orders[id(site.values)] = partial(site.part.in_order, bits=bits)
            found[id(site.compact)] = whole_weight(site, site.part, bits.to("cpu" if keep else "meta"))
    for tensor in (*model.parameters(), *model.buffers()):
        whole = make_whole(tensor.detach())
        whole = orders[id(tensor)](whole) if id(tensor) in orders else whole
        copied = whole.to("cpu", copy=True) if keep else torch.empty_like(whole, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        found[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
    return found


def _restore_order(module: nn.Module, order: list[str]) -> None:
    """Puts the parameters into the order they had, by which the state of a plain optimizer is keyed."""
    parameters = dict(module._parameters)
    places = {name: i for i, name in enumerate(order)}
    module._parameters.clear()
    for name in sorted(parameters, key=lambda name: places.get(name, len(places))):
        module._parameters[name] = parameters[name]
