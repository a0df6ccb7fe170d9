"""Finds the routers of mixtures of experts, which stay dense, since one lost score can starve an expert.

A router is known by what it does: it scores experts. Its last matrix has as many outputs as there are experts, and it
stands beside the experts or above them. A name alone ("gate") is not enough, since gated networks use the same names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_COUNT_NAME = re.compile(r"(moe_)?(num|n)_(local_|routed_|total_)?experts?|experts?_(num|count)", re.IGNORECASE)
_COUNT_ATTRIBUTES = ("num_experts", "num_local_experts", "n_experts", "n_routed_experts")
_SCORING_WORDS = {"gate", "gates", "gating", "routing", "wg", "switch", "dispatch", "dispatcher", "selector", "scorer"}
_SCORING_WORDS |= {"noise", "noisy"}
_SCORING_CLASSES = ("gate", "gating", "routing", "topk", "top1", "top2", "selector", "dispatch")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_GATES = ("gate", "gates", "gating", "wg")


def find_routers(model: nn.Module) -> set[int]:
    """Returns the identities of all modules that are routers or lie in one."""
    modules = dict(model.named_modules())
    own_counts = {name: _expert_counts(module) for name, module in modules.items()}
    all_counts: dict[str, set[int]] = {name: set() for name in modules}
    for name, counts in own_counts.items():
        for prefix in _prefixes(name) if counts else ():
            all_counts[prefix] |= counts
    found: set[int] = set()
    for name, module in modules.items():
        for child_name in _routers_of(module, own_counts[name], all_counts[name]):
            path = f"{name}.{child_name}" if name else child_name
            inside = modules.get(path, module._modules[child_name])
            assert inside is not None
            parts = ((part_name.rpartition(".")[2], part) for part_name, part in inside.named_modules() if part_name)
            if not any(_is_experts(part_name, part) for part_name, part in parts):
                found.update(id(part) for part in inside.modules())
    return found


def is_expert_stack(module: nn.Module, tensor: Tensor) -> bool:
    """Returns whether ``tensor`` stacks the weights of experts: (E, R, C) with R, C > 1, in a module of experts.

    A module says that it holds experts by its class name ("MixtralExperts"), or by an attribute ``num_experts``,
    ``num_local_experts``, ``n_experts`` or ``n_routed_experts`` that equals E > 1. Position embeddings (1, T, D) and
    class tokens (1, 1, D) have E = 1; routers are 2-D.
    """
    if tensor.dim() != 3 or min(tensor.shape) <= 1:
        return False
    counts = [attribute(module, name) for name in _COUNT_ATTRIBUTES]
    return "experts" in type(module).__name__.lower() or any(
        isinstance(count, int) and count == tensor.shape[0] for count in counts
    )


def attribute(module: nn.Module, name: str) -> Any:
    """Returns the attribute, or None where there is none or a property raises."""
    try:
        return getattr(module, name, None)
    except Exception:
        return None


def _routers_of(parent: nn.Module, own_counts: set[int], all_counts: set[int]) -> Iterator[str]:
    """Yields the names of the children of ``parent`` that score experts.

    Args:
        own_counts: the numbers of experts that ``parent`` itself holds.
        all_counts: the numbers of experts that ``parent`` or any module in it holds.
    """
    children = {name: child for name, child in parent._modules.items() if child is not None}
    others = {name: child for name, child in children.items() if not _is_experts(name, child)}
    holds_experts = bool(own_counts) or len(others) < len(children) or attribute(parent, "experts") is not None
    counts = all_counts | _counts_in_attributes(parent, and_config=holds_experts)
    counts |= {len(child._modules) for child in children.values() if _is_list_of_alike(child)}
    named = set()
    for name, child in others.items():
        outputs = _outputs(child)
        is_named = _scores_by_name(name, child)
        is_gate = name.lower() in _GATES and holds_experts
        if _is_router_by_name(name, child) or is_gate or (is_named and outputs & counts):
            named.add(name)
    yield from named
    if not named and own_counts - _widths(children):
        yield from (name for name, child in others.items() if _outputs(child) & (own_counts - _widths(children)))


def _is_router_by_name(name: str, child: nn.Module) -> bool:
    return name.endswith("expert_gate") or "router" in name.lower() or "router" in type(child).__name__.lower()


def _scores_by_name(name: str, child: nn.Module) -> bool:
    words = set(re.split(r"[_\d]+", name.lower()))
    return bool(words & _SCORING_WORDS) or any(part in type(child).__name__.lower() for part in _SCORING_CLASSES)


def _is_experts(name: str, child: nn.Module | None) -> bool:
    """Returns whether a child holds the experts among which a router chooses; shared experts see every token."""
    name, kind = name.lower(), type(child).__name__.lower()
    if child is None or "shared" in name or "gate" in name or "router" in kind:
        return False
    return name == "experts" or "experts" in kind or ("expert" in name and bool(_counts_in(child)))


def _expert_counts(module: nn.Module) -> set[int]:
    """Returns the numbers of experts that ``module`` holds, in a child that holds them all or in stacks of its own."""
    named = [t for name, t in module._parameters.items() if t is not None and "expert" in name.lower()]
    stacks = [tensor for tensor in _parameters(module) if is_expert_stack(module, tensor)]
    counts = {tensor.shape[0] for tensor in [*stacks, *named] if not nn.parameter.is_lazy(tensor) and tensor.dim() == 3}
    holders = [child for name, child in module._modules.items() if child is not None and _is_experts(name, child)]
    return {count for count in counts.union(*(_counts_in(child) for child in holders)) if count > 1}


def _counts_in(child: nn.Module) -> set[int]:
    """Returns how many experts a module of experts may hold, by its attributes, its lists and its stacked weights."""
    if isinstance(child, _CONTAINERS):
        return {len(child._modules)}
    inside = [part for part in child._modules.values() if part is not None]
    counts = {len(part._modules) for part in inside if isinstance(part, _CONTAINERS)}
    stacks = {t.shape[0] for part in (child, *inside) for t in _parameters(part) if t.dim() == 3}
    return counts | stacks | _counts_in_attributes(child, and_config=False)


def _parameters(module: nn.Module) -> Iterator[Tensor]:
    """Yields the parameters of ``module`` itself that have a shape."""
    for tensor in module._parameters.values():
        if tensor is not None and not nn.parameter.is_lazy(tensor):
            yield tensor


def _counts_in_attributes(module: nn.Module, and_config: bool) -> set[int]:
    """Returns the numbers of experts above 1 that attributes of ``module``, and of its ``config``, name."""
    config = vars(module).get("config") if and_config else None
    attributes = {**(vars(config) if hasattr(config, "__dict__") else {}), **vars(module)}
    return {
        value for key, value in attributes.items() if _COUNT_NAME.fullmatch(key) and type(value) is int and value > 1
    }


def _is_list_of_alike(child: nn.Module) -> bool:
    parts = [part for part in child._modules.values() if part is not None]
    return isinstance(child, _CONTAINERS) and len(parts) > 1 and len({type(p) for p in parts}) == 1


def _outputs(module: nn.Module) -> set[int]:
    """Returns how many features come out of the last matrix in ``module``; of each module, for a list of modules."""
    if isinstance(module, _CONTAINERS):
        return set().union(*(_outputs(part) for part in module._modules.values() if part is not None))
    found: set[int] = set()
    for part in module.modules():
        found = _own_outputs(part) or found
    return found


def _own_outputs(module: nn.Module) -> set[int]:
    features = attribute(module, "out_features")
    if isinstance(features, int):
        return {features}
    if type(module).__name__ == "Conv1D":
        features = attribute(module, "nf")
        return {features} if isinstance(features, int) else set()
    return {tensor.shape[0] for tensor in _parameters(module) if tensor.dim() == 2}


def _widths(children: dict[str, nn.Module]) -> set[int]:
    """Returns the sizes of what experts read and write: an output of such a size may be a feature, not a score."""
    return {
        side
        for name, child in children.items()
        if _is_experts(name, child)
        for part in child.modules()
        for tensor in _parameters(part)
        if tensor.dim() >= 2
        for side in tensor.shape[-2:]
    }


def _prefixes(name: str) -> Iterator[str]:
    """Yields the module's own name and those of all modules above it: "a.b" → "a.b", "a", ""."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""
