"""Finds the sites of a model: its compact weights, each with the module that reads it.

They are found through modules, since an attribute that marks a Parameter would be lost by ``deepcopy`` and
``load_state_dict(assign=True)``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from smet_compile.format import Layout, Part, Topology
from smet_compile.ops import loading
from smet_compile.ops.compact_weight import CompactWeight
from smet_compile.shards import Rows

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Modules whose weight is read as one matrix: its first dimension, and all others together."""
_AT_DENSITY_ONE = "_smet_at_density_one"


def is_depthwise(module: nn.Module) -> bool:
    """Tells whether ``module`` is a convolution each of whose filters reads one channel alone."""
    if not isinstance(module, CONVOLUTIONS):
        return False
    return module.groups > 1 and module.groups == module.in_channels


@dataclass(frozen=True)
class Site:
    """Identifies one compact weight: ``module.<tensor_name>`` reads as the dense weight."""

    name: str
    module: nn.Module
    tensor_name: str

    @property
    def compact(self) -> CompactWeight:
        compact: CompactWeight = parametrizations(self.module)[self.tensor_name][0]
        return compact

    @property
    def values_maybe(self) -> nn.Parameter | None:
        """Returns ``values``, or None after the parametrization was removed (``remove_parametrizations``).

        Every optimizer step calls it, so it avoids the slow ``nn.Module.__getattr__``.
        """
        chains = self.module._modules.get("parametrizations")
        chain = None if chains is None else chains._modules.get(self.tensor_name)
        return None if chain is None else chain._parameters.get("original")

    @property
    def values(self) -> nn.Parameter:
        """Returns the compact parameter: (N,) for single weights, (N, bm, bn) for larger blocks."""
        values: nn.Parameter = parametrizations(self.module)[self.tensor_name].original
        return values

    def mark_resized(self) -> None:
        """Has compiled code look at the shape of the parameter again, after it has changed."""
        loading.mark_resized(parametrizations(self.module)[self.tensor_name])

    @property
    def layout(self) -> Layout:
        return self.compact.layout

    @property
    def num_active(self) -> int:
        return self.compact.num_active

    @property
    def part(self) -> Part | None:
        """Says where the weight lies in one that tensor parallelism has cut; None where it is whole."""
        return self.compact.part

    @property
    def whole(self) -> Layout:
        """Returns the layout of the weight that all ranks of tensor parallelism have together."""
        return self.layout if self.part is None else self.part.whole

    @property
    def num_active_in_whole(self) -> int:
        return self.num_active if self.part is None else self.part.count * self.num_active

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Returns the shape of the values, of all ranks together."""
        return self.layout.values_shape(self.num_active_in_whole)

    @property
    def rows(self) -> Rows:
        """Returns which rows of the values each rank holds: of the whole weight, or of this rank's part of it."""
        return Rows.of(self.values, None if self.part is None else self.part.mesh)

    def topology_of(self, rows: slice) -> Topology:
        """Returns where some rows lie in the whole weight, as a topology without other active blocks."""
        active = self.compact.active
        return active.of_rows(rows) if self.part is None else self.part.topology_here(active, rows)

    def bits_of_whole(self, bits: Tensor) -> Tensor:
        """Returns the bits of the whole weight from those here; every rank of tensor parallelism has to ask."""
        return bits if self.part is None else self.part.bits_of_all(bits)

    @property
    def density(self) -> float:
        return self.num_active / self.layout.num_blocks

    def mask(self) -> Tensor:
        return self.compact.mask()


def parametrizations(module: nn.Module) -> Any:
    """Returns tensor name → chain of parametrizations of ``module``; empty for most modules.

    It does not use ``getattr``, since a compiled module returns the attributes of the module inside it.
    """
    if "parametrizations" not in module._modules:  # TorchScript's mapping has no `get`
        return {}
    found = module._modules["parametrizations"]
    return found if isinstance(found, nn.ModuleDict) else {}


def compact_names(module: nn.Module) -> Iterator[str]:
    """Yields the names of the tensors of ``module`` that are compact."""
    for name, chain in parametrizations(module).items():
        if isinstance(chain, nn.ModuleList) and isinstance(chain[0], CompactWeight):
            yield name


_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper", "_checkpoint_wrapped_module"),
    ("lightning.fabric.wrappers", "_FabricModule", "_forward_module"),
    ("lightning_fabric.wrappers", "_FabricModule", "_forward_module"),
)
"""Modules that only pass calls on: the module that defines the class, its name, and the child that it wraps."""


def wrapped_child(module: nn.Module) -> str | None:
    """Returns the name of the child that ``module`` wraps; None where it is no wrapper.

    The class decides, never the name of a child. A class that nobody has imported has no instance.
    """
    for where, name, child in _WRAPPERS:
        wrapper = getattr(sys.modules.get(where), name, None)
        if wrapper is not None and isinstance(module, wrapper):
            return child
    return None


def without_wrappers(module: nn.Module) -> nn.Module:
    """Returns the module that ``torch.compile`` or data parallelism wraps; ``module`` itself where none does."""
    while (child := wrapped_child(module)) is not None:
        module = module.get_submodule(child)
    return module


def canonical_name(model: nn.Module, name: str) -> str:
    """Returns the qualified name of a module, parameter or buffer of ``model`` without the names of wrappers.

    So a model that is compiled or wrapped for data parallelism, in whole or in part, has the names of the plain model.
    """
    module: nn.Module | None = model
    kept = []
    for part in name.split(".") if name else []:
        while module is not None and (child := wrapped_child(module)) is not None:
            is_named = part in module._modules  # Fabric's has the model a second time, without the wrappers in between
            module = module._modules[part if is_named else child]
            if is_named:
                break
        else:
            kept.append(part)
            module = None if module is None or part not in module._modules else module._modules[part]
    return ".".join(kept)


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Returns every compact weight of ``model`` by its canonical name, which is that in the plain dense model."""
    sites = {}
    for prefix, module in model.named_modules():
        _refuse_flattened(module)
        for tensor_name in compact_names(module):
            name = canonical_name(model, f"{prefix}.{tensor_name}" if prefix else tensor_name)
            sites[name] = Site(name, module, tensor_name)
    return sites


def all_names(model: nn.Module, owners: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Returns all canonical names of weights: several where a module is registered under several names.

    Args:
        owners: by one canonical name of each weight the module that owns it.
    """
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(canonical_name(model, prefix))
    found = {}
    for weight, owner in owners.items():
        tensor_name = weight.rpartition(".")[2]
        found[weight] = list(dict.fromkeys(f"{name}.{tensor_name}".removeprefix(".") for name in names[id(owner)]))
    return found


def names_of_sites(model: nn.Module) -> dict[str, list[str]]:
    """Returns all canonical names of each compact weight by that under which ``find_sites`` has it."""
    return all_names(model, {name: site.module for name, site in find_sites(model).items()})


def holders_of(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Returns each parameter once, with every module that holds it and its name there; tied ones have several."""
    found: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(parameter, []).append((module, name))
    return found


def _refuse_flattened(module: nn.Module) -> None:
    flattening = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if flattening is not None and isinstance(module, flattening):
        raise ValueError(
            "model: expected modules of its own, DistributedDataParallel or fully_shard, got FullyShardedDataParallel, "
            "which makes one flat parameter of weights whose rows belong together; call sparsify, then fully_shard of "
            "torch.distributed.fsdp (docs/sharding.md)"
        )


def mark_dense(module: nn.Module) -> None:
    """Notes that a weight of ``module`` was made sparse at density 1, which leaves it a plain parameter."""
    module.__dict__[_AT_DENSITY_ONE] = True


def forget_dense(module: nn.Module) -> None:
    """Removes the note that ``mark_dense`` made."""
    module.__dict__.pop(_AT_DENSITY_ONE, None)


def is_sparsified(model: nn.Module) -> bool:
    """Tells whether ``sparsify`` was called for the model, at density 1 too."""
    return bool(find_sites(model)) or any(_AT_DENSITY_ONE in module.__dict__ for module in model.modules())


def check_sparsified(where: str, model: nn.Module) -> None:
    """Raises ValueError for a model that was never sparsified. One at density 1 passes, as a dense baseline."""
    if not is_sparsified(model):
        raise ValueError(f"{where}: expected a model with compact weights, got one with none; sparsify it")
