"""What Inductor fuses, node by node: which ops make a tensor of their own, and what a node is a view of."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

_aten, _prims = torch.ops.aten, torch.ops.prims
_FUSED: set[Any] = {
    _aten.clone, _aten._to_copy, _aten.constant_pad_nd, _aten.cat, _aten.embedding, _aten.index, _aten.gather,
    _aten.full, _aten.full_like, _aten.arange, _aten.empty, _aten.lift_fresh_copy, _aten.scalar_tensor, _aten.flip,
    _aten.select_scatter, _aten.slice_scatter, _aten.scatter, _prims.convert_element_type, _prims.iota,
}  # fmt: skip
_REDUCED: set[Any] = {
    _aten.sum, _aten.mean, _aten.amax, _aten.amin, _aten.var_mean, _aten.any, _aten.all, _aten.prod, _aten.argmax,
}  # fmt: skip


def shape(value: Tensor) -> list[int]:
    """Its lengths, as they were in this run where a checkpointed region holds some as symbols."""
    return [length.node.hint if isinstance(length, torch.SymInt) else length for length in value.shape]


def packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def is_fused(node: fx.Node) -> bool:
    """Whether code generation merges it into what reads it."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in op.tags or op.overloadpacket in _FUSED


def is_effect(node: fx.Node) -> bool:
    """Writes into what there is, and makes nothing."""
    return packet(node) is _aten.copy_ or "auto_functionalized" in str(node.target)


def wants_tensor(user: fx.Node) -> bool:
    if user.op == "output" or is_effect(user):
        return True
    return not is_fused(user) and packet(user) not in _REDUCED


def base(node: fx.Node) -> fx.Node:
    """What ``node`` is a view of, or a part of; itself where it is neither."""
    op = node.target
    if isinstance(op, torch._ops.OpOverload) and (op.is_view or op.overloadpacket is _aten.reshape):
        return base(node.all_input_nodes[0])
    if op is operator.getitem and is_effect(node.args[0]):  # type: ignore[arg-type]
        return node.args[0]  # type: ignore[return-value]
    return node


def users(node: fx.Node) -> set[fx.Node]:
    """What reads ``node`` or a view of it."""
    found: set[fx.Node] = set()
    for user in node.users:
        found |= users(user) if base(user) is not user and user.op != "output" else {user}
    return found
