"""Defines what the file of a compact model holds, and under which names.

The file has the tensors of the plain model under their own names, but for each compact weight ``name`` two others:
``name.values``, one row per active block, and ``name.topology``, one bit per block. A weight of a layer that is
registered under several names has these under each of them, stored once. The JSON says by one of its names how each
compact weight is cut into blocks, and which class and versions wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from smet_compile.ops.loaded import check_keys
from smet_compile.ops.sites import find_sites, names_of_sites, parametrizations
from smet_compile.runtime.checkpoint_file import make_flattener, read_tree, write_flat
from smet_compile.runtime.parts import join_parts
from smet_compile.runtime.saved_state import layouts_of, model_entries
from smet_compile.shards import Unsharded

FILE = "compact.safetensors"
_CONTENT = "compact model"
_VALUES, _TOPOLOGY = ".values", ".topology"
_STATE_NAME = re.compile(r"((.*)parametrizations\.([^.]+))\.(?:original|0\.topology)")


@dataclass(frozen=True)
class Content:
    """Holds what a file says of a model.

    Args:
        class_name: the class of the model. versions: of the packages that wrote the file.
        layouts: shape, matrix and block shape of each compact weight, then pattern and slabs where it has these.
        tensors: parameters and buffers by their names in the file.
        method: how the topology came about, by the names of the manager's settings; empty where nobody said it.
    """

    class_name: str
    versions: dict[str, str]
    layouts: dict[str, list[Any]]
    tensors: dict[str, Any]
    method: dict[str, Any]

    def by_state_names(self, weights: Iterable[str]) -> dict[str, Any]:
        """Returns the tensors by the names that they have in the state dict of a model.

        Args:
            weights: all names of the compact weights of that model.
        """
        names = state_names(weights)
        return {names.get(name, name): tensor for name, tensor in self.tensors.items()}


def state_names(weights: Iterable[str]) -> dict[str, str]:
    """Returns for each name in the file of a compact weight's tensor the name in the state dict."""
    found: dict[str, str] = {}
    for weight in weights:
        module, _, name = weight.rpartition(".")
        chain = f"{module}.parametrizations.{name}".removeprefix(".")
        found |= {weight + _VALUES: f"{chain}.original", weight + _TOPOLOGY: f"{chain}.0.topology"}
    return found


def flat(names: Mapping[str, list[str]]) -> list[str]:
    """Returns all names of all weights."""
    return [name for of_weight in names.values() for name in of_weight]


def values_name(weight: str) -> str:
    return weight + _VALUES


def topology_name(weight: str) -> str:
    return weight + _TOPOLOGY


def content_of(model: nn.Module, versions: dict[str, str], method: dict[str, Any]) -> Content:
    """Returns what a file is to hold of ``model``; every rank of one that is sharded has to call.

    Raises ValueError for a compact weight that another parametrization changes: the file holds no such thing.
    """
    for name, site in find_sites(model).items():
        if further := list(parametrizations(site.module)[site.tensor_name])[1:]:
            raise ValueError(
                f"{name}: expected a compact weight that is read as it is, got one that {type(further[0]).__name__} "
                "changes (register_parametrization); remove it, or save smet.export_dense(model)"
            )
    layouts = layouts_of(model)
    whole = join_parts(model, {"model": model_entries(model), "optimizer": None, "other_optimizers": []})["model"]
    in_file = {state: name for name, state in state_names(flat(names_of_sites(model))).items()}
    tensors: dict[str, Any] = {}
    for name, tensor in whole.items():
        name = in_file.get(name, name)
        if name in tensors:
            raise ValueError(f"{name}: expected one tensor of this name, got two; rename the other in the model")
        tensors[name] = tensor
    return Content(_class_name(model), versions, layouts, tensors, method)


def _class_name(model: nn.Module) -> str:
    """Returns the name of the class that the model had before it was sharded and parametrized."""
    plain = Unsharded.of(model)
    kind = type(model) if plain is None else plain.kind
    return (kind.__bases__[0] if is_parametrized(model) else kind).__name__


def write(path: Path, content: Content) -> None:
    """Writes the file; every rank of a sharded model has to call, and the first of them writes."""
    flattener = make_flattener()
    tensors = {name: flattener.flatten(tensor, name) for name, tensor in content.tensors.items()}
    about = {
        "class": content.class_name,
        "versions": content.versions,
        "layouts": content.layouts,
        "method": content.method,
    }
    write_flat(path, {"tensors": tensors, **flattener.flatten(about, "about")}, flattener, _CONTENT)


def read(path: Path) -> Content:
    """Reads the file; raises ValueError where it is not whole, was altered, or is another one."""
    tree = read_tree(path, _CONTENT)
    try:
        check_keys(_CONTENT, tree, ("class", "versions", "layouts", "method", "tensors"))
        for part in ("versions", "layouts", "method", "tensors"):
            check_keys(part, tree[part], (), tree[part])
        if not isinstance(tree["class"], str):
            raise ValueError("class: expected the name of a class, got something else")
        _check_pairs(tree["layouts"], tree["tensors"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Content(tree["class"], tree["versions"], tree["layouts"], _with_file_names(tree["tensors"]), tree["method"])


def _with_file_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors of a file by the names that ``content_of`` gives them.

    Older versions wrote the second and later names of a compact weight as they are in a state dict.
    """
    chains = {match[1]: f"{match[2]}{match[3]}" for name in tensors if (match := _STATE_NAME.fullmatch(name))}
    names: dict[str, str] = {}
    for chain, weight in chains.items():
        values, topology = f"{chain}.original", f"{chain}.0.topology"
        if values in tensors and topology in tensors:
            names |= {values: weight + _VALUES, topology: weight + _TOPOLOGY}
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def _check_pairs(layouts: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Checks that every compact weight has its two tensors."""
    for name in state_names(layouts):
        if name not in tensors:
            raise ValueError(f"{name}: expected this tensor of a compact weight, found none; the file is not whole")
