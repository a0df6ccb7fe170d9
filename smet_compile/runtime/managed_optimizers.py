"""ManagedOptimizers: the optimizers of one manager, whose weights and state follow its topologies."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from smet_compile.ops import Site
from smet_compile.ops.optimizers import FoundOptimizer, find_optimizers, siblings
from smet_compile.runtime.optimizer_state import StateToMove, state_to_move


class ManagedOptimizers:
    """Finds the optimizers in ``given`` that hold parameters of ``model``.

    For compact weights that they do not hold, other ``ActiveAdamW`` of the same model are taken, where one is given.

    Raises:
        ValueError: a compact weight that no optimizer holds; a state that cannot follow a topology change.
    """

    def __init__(self, given: Any, model: nn.Module, sites: dict[str, Site]) -> None:
        self._given = given
        self._model = model
        self._sites = sites
        self.find()

    def find(self) -> None:
        """Looks anew: a group may have been added, and some wrappers make what they wrap in their first steps."""
        found = find_optimizers(self._given, self._model.parameters())
        held = {parameter for each in found for parameter in each.holds}
        missing = [site.values for site in self._sites.values() if id(site.values) not in held]
        found += find_optimizers(siblings(found, missing), self._model.parameters())
        self._check_holds(found)
        self.state: StateToMove = state_to_move(found, self._sites)
        self.found = found
        self._values = {name: site.values for name, site in self._sites.items()}

    @property
    def stepping(self) -> list[FoundOptimizer]:
        """Returns the optimizers whose own step updates a parameter of the model."""
        return [each for each in self.found if each.steps]

    def ages(self, values: nn.Parameter) -> Tensor | None:
        """Ages of the active blocks, from the optimizer that steps the weight; None where it keeps none."""
        for each in self.stepping:
            if id(values) in each.steps and hasattr(each.optimizer, "block_ages"):
                ages: Tensor = each.optimizer.block_ages(values)
                return ages
        return None

    def check_weights(self) -> None:
        """Raises ValueError where a compact weight is no longer the parameter that an optimizer was made with."""
        for name, site in self._sites.items():
            values = site.values_maybe
            if values is None:
                raise ValueError(
                    f"{name}: the weight was made dense (remove_parametrizations, export_dense, ...) after the manager "
                    "was made; make the optimizer and the manager anew"
                )
            if values is not self._values[name] and values.requires_grad:
                groups = (group for each in self.found for group in each.optimizer.param_groups)
                if not any(p is values for group in groups for p in group["params"]):
                    raise ValueError(
                        f"{name}: the model's weight was replaced (load_state_dict(assign=True), to_empty, ...) after "
                        "the optimizer was made; make the optimizer and the manager anew"
                    )

    def _check_holds(self, found: list[FoundOptimizer]) -> None:
        held = {parameter for each in found for parameter in each.holds}
        missing = [name for name, site in self._sites.items() if id(site.values) not in held]
        names = [name for name in missing if self._sites[name].values.requires_grad]
        if names:
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise ValueError(
                f"{shown}: expected the optimizer to hold the compact values, but {type(self._given).__name__} does "
                "not; make the optimizer from model.parameters() after sparsify, and where there are several, pass all "
                "of them in a list"
            )
