"""export_dense: the way back to a plain model."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

from smet_compile.convert.report import forget_reasons
from smet_compile.ops import find_sites, reads, saved_weights


@torch.no_grad()
def export_dense(model: nn.Module) -> nn.Module:
    """A plain copy of ``model``: dense weights, zero where inactive, no trace of this library.

    ``model`` itself stays compact and trainable. For a Hugging Face model, ``save_pretrained`` of the copy
    loads anywhere. Takes the memory of the dense weights.

    Raises:
        ValueError: the model has no compact weight.
    """
    if not find_sites(model):
        raise ValueError("export_dense: expected a model with compact weights, got one with none; it is plain already")
    reads.settle_live()
    dense = copy.deepcopy(model)
    for site in find_sites(dense).values():
        order = site.compact.parameter_order
        _give_own_class(site.module)
        parametrize.remove_parametrizations(site.module, site.tensor_name, leave_parametrized=True)
        _restore_order(site.module, order)
    for module in dense.modules():
        saved_weights.uninstall(module)
        forget_reasons(module)
    return dense


def _restore_order(module: nn.Module, order: list[str]) -> None:
    """Parameters in the order they had: what a plain optimizer's state is keyed by."""
    parameters = dict(module._parameters)
    places = {name: i for i, name in enumerate(order)}
    module._parameters.clear()
    for name in sorted(parameters, key=lambda name: places.get(name, len(places))):
        module._parameters[name] = parameters[name]


def _give_own_class(module: nn.Module) -> None:
    """A deep copy shares its parametrized class with the original, and removal edits the class."""
    shared = type(module)
    body = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, body)
