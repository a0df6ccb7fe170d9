"""Carries how a model trains: which parameters do, the modes of its modules, and corrections for batch norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from smet_compile.distributed.layout import TensorNote
from smet_compile.distributed.space import Region
from smet_compile.ops import canonical_name, find_sites
from smet_compile.ops.scaled_steps import scale_steps
from smet_compile.runtime.saved_correction import correction_entries, take_correction


@dataclass(frozen=True)
class Modes:
    """Holds what a model has beside its tensors; every rank has the same.

    Args:
        requires_grad: whether each parameter trains, by its name.
        training: whether each module is in training mode, by its name.
        correction: what ``correct_gradients`` decided for each compact weight.
        extra: what ``get_extra_state`` of modules returns, by their names.
    """

    requires_grad: dict[str, bool]
    training: dict[str, bool]
    correction: dict[str, dict[str, Any]]
    extra: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module) -> Modes:
        """Returns those of a model."""
        modules = {canonical_name(model, name): module for name, module in model.named_modules()}
        return cls(
            {canonical_name(model, name): each.requires_grad for name, each in model.named_parameters()},
            {name: module.training for name, module in modules.items()},
            correction_entries(model),
            {name: module.get_extra_state() for name, module in modules.items() if _has_extra_state(module)},
        )

    def check(self, target: Mapping[str, TensorNote]) -> None:
        """Raises ValueError for a layout in which gradients or steps cannot be corrected as they are."""
        for note in target.values():
            entry = None if note.parts is None else self.correction.get(note.parts.name)
            if note.parts is None or entry is None:
                continue
            is_corrected = entry["scales_rows"] or entry["scales_steps"]
            if is_corrected and note.parts.count > 1:
                raise ValueError(
                    f"{note.parts.name}: expected a layout with whole rows, since correct_gradients corrects this "
                    "weight, got tensor parallelism; switch to one without it"
                )
            if entry["scales_steps"] and any(region != Region(0, note.shape[0]) for region in note.regions.values()):
                raise ValueError(
                    f"{note.parts.name}: expected a layout that holds the weight whole, since its steps are scaled "
                    "(correct_gradients), got one that cuts it; switch to one without fully_shard"
                )

    def give(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Has a model that is made alike, and the optimizers that hold its parameters, train in the same way."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.requires_grad[canonical_name(model, name)])
        for raw, module in model.named_modules():
            name = canonical_name(model, raw)
            module.training = self.training.get(name, module.training)
            if name in self.extra and _has_extra_state(module):
                module.set_extra_state(self.extra[name])
        take_correction(self.correction, model)
        scaled = [site for site in find_sites(model).values() if site.compact.scales_steps]
        for optimizer in optimizers:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            scale_steps(optimizer, [site for site in scaled if id(site.values) in held])


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state
