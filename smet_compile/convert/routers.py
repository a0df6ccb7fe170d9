"""Finds the modules that send tokens to experts: they stay dense, since one lost score can starve an expert.

A router is known by what it does: it scores experts. Its last matrix has as many outputs as there are experts, and it
stands beside the experts or above them. A name alone ("gate") is not enough, since gated networks use the same names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_COUNT = re.compile(r"(moe_)?(num|n)_(local_|routed_|total_)?experts?|experts?_(num|count)", re.IGNORECASE)
_SAID_COUNTS = ("num_experts", "num_local_experts", "n_experts", "n_routed_experts")
_SCORING_WORDS = {"gate", "gates", "gating", "routing", "wg", "switch", "dispatch", "dispatcher", "selector", "scorer"}
_SCORING_WORDS |= {"noise", "noisy"}
_SCORING_CLASSES = ("gate", "gating", "routing", "topk", "top1", "top2", "selector", "dispatch")
_GATES = ("gate", "gates", "gating", "wg")


def find_routers(model: nn.Module) -> set[int]:
    """Identities of all modules that are routers or lie in one."""
    modules = dict(model.named_modules())
    beside = {name: _expert_counts(module) for name, module in modules.items()}
    within: dict[str, set[int]] = {name: set() for name in modules}
    for name, counts in beside.items():
        for above in _prefixes(name) if counts else ():
            within[above] |= counts
    found: set[int] = set()
    for name, module in modules.items():
        for child_name in _routers_of(module, beside[name], within[name]):
            path = f"{name}.{child_name}" if name else child_name
            inside = modules.get(path, module._modules[child_name])
            assert inside is not None
            if not any(_is_experts(part_name, part) for part_name, part in inside._modules.items()):
                found.update(id(part) for part in inside.modules())
    return found


def is_expert_stack(module: nn.Module, tensor: Tensor) -> bool:
    """The rule for stacked experts: (E, R, C) with R, C > 1, in a module that says it holds experts.

    It says so by its class name ("MixtralExperts"), or by an attribute ``num_experts``, ``num_local_experts``,
    ``n_experts`` or ``n_routed_experts`` that equals E > 1. Position embeddings (1, T, D) and class tokens
    (1, 1, D) have E = 1; routers are 2-D.
    """
    if tensor.dim() != 3 or min(tensor.shape) <= 1:
        return False
    counts = [attribute(module, name) for name in _SAID_COUNTS]
    return "experts" in type(module).__name__.lower() or any(
        isinstance(count, int) and count == tensor.shape[0] for count in counts
    )


def attribute(module: nn.Module, name: str) -> Any:
    """The attribute, or None where there is none or a property raises."""
    try:
        return getattr(module, name, None)
    except Exception:
        return None


def _routers_of(parent: nn.Module, beside: set[int], within: set[int]) -> Iterator[str]:
    """Names of the children of ``parent`` that score experts.

    Args:
        beside: numbers of experts that ``parent`` itself holds. within: the same with all that lies in its children.
    """
    children = {name: child for name, child in parent._modules.items() if child is not None}
    others = {name: child for name, child in children.items() if not _is_experts(name, child)}
    holds_experts = bool(beside) or len(others) < len(children)
    counted = within | _said_counts(parent, and_config=holds_experts)
    lists = {len(child._modules) for child in children.values() if _is_list_of_alike(child)}
    named = set()
    for name, child in others.items():
        outputs = _outputs(child)
        is_named = _scores_by_name(name, child)
        is_gate = name.lower() in _GATES and holds_experts
        if _is_router_by_name(name, child) or is_gate or (is_named and outputs & (counted | lists)):
            named.add(name)
    yield from named
    if not named and beside - _widths(children):
        yield from (name for name, child in others.items() if _outputs(child) & (beside - _widths(children)))


def _is_router_by_name(name: str, child: nn.Module) -> bool:
    return name.endswith("expert_gate") or "router" in name.lower() or "router" in type(child).__name__.lower()


def _scores_by_name(name: str, child: nn.Module) -> bool:
    words = set(re.split(r"[_\d]+", name.lower()))
    return bool(words & _SCORING_WORDS) or any(part in type(child).__name__.lower() for part in _SCORING_CLASSES)


def _is_experts(name: str, child: nn.Module | None) -> bool:
    """Whether a child holds the experts among which a router chooses; shared experts see every token."""
    if child is None or "shared" in name.lower() or "gate" in name.lower():
        return False
    if "expert" in name.lower() or "experts" in type(child).__name__.lower():
        return "router" not in type(child).__name__.lower()
    return False


def _expert_counts(module: nn.Module) -> set[int]:
    """Numbers of experts that ``module`` holds: in a child that holds them all, or in stacks of its own."""
    counts = set()
    for tensor in module._parameters.values():
        if tensor is not None and not nn.parameter.is_lazy(tensor) and is_expert_stack(module, tensor):
            counts.add(tensor.shape[0])
    for name, child in module._modules.items():
        if child is None or not _is_experts(name, child):
            continue
        counts |= _said_counts(child, and_config=False)
        for part in child.modules():
            counts |= {t.shape[0] for t in part._parameters.values() if _is_stack(t)}
            if isinstance(part, nn.ModuleList | nn.ModuleDict):
                counts.add(len(part._modules))
    return {count for count in counts if count > 1}


def _is_stack(tensor: Tensor | None) -> bool:
    return tensor is not None and not nn.parameter.is_lazy(tensor) and tensor.dim() == 3


def _said_counts(module: nn.Module, and_config: bool) -> set[int]:
    """Counts above 1 among the attributes of ``module``, and of its ``config``."""
    config = vars(module).get("config") if and_config else None
    attributes = {**(vars(config) if hasattr(config, "__dict__") else {}), **vars(module)}
    return {value for key, value in attributes.items() if _COUNT.fullmatch(key) and type(value) is int and value > 1}


def _is_list_of_alike(child: nn.Module) -> bool:
    parts = [part for part in child._modules.values() if part is not None]
    return isinstance(child, nn.ModuleList | nn.ModuleDict) and len(parts) > 1 and len({type(p) for p in parts}) == 1


def _outputs(module: nn.Module) -> set[int]:
    """Numbers of features that come out of the last matrix in ``module``; of each, for a list of modules."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
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
    tensors = [t for t in module._parameters.values() if t is not None and not nn.parameter.is_lazy(t)]
    return {side for tensor in tensors if tensor.dim() == 2 for side in tensor.shape[:1]}


def _widths(children: dict[str, nn.Module]) -> set[int]:
    """Sizes of the features that the experts read and write: a number of experts that equals one says nothing."""
    return {
        side
        for name, child in children.items()
        if _is_experts(name, child)
        for part in child.modules()
        for tensor in part._parameters.values()
        if tensor is not None and not nn.parameter.is_lazy(tensor)
        for side in (tensor.shape[-2:] if tensor.dim() == 3 else tensor.shape if tensor.dim() == 2 else ())
    }


def _prefixes(name: str) -> Iterator[str]:
    """The module's own name and those of all above it: "a.b" → "a.b", "a", ""."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""
