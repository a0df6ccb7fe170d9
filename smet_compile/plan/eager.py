"""Follows an eager training step on fake tensors: what is made, when it dies, and how many operations that takes."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from smet_compile.format import Layout
from smet_compile.plan.timeline import Degrees, Term, Timeline

_aten = torch.ops.aten
_COMPACT_PRODUCTS: dict[Any, Callable[[Any], int]] = {
    torch.ops.smet.masked_matmul: lambda args: int(args[1].shape[0]),
    torch.ops.smet.sampled_matmul: lambda args: int(args[5]),
}
"""The ops that multiply directly, with their number of active blocks as a function of the arguments."""
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward


class EagerFollower(TorchDispatchMode):
    """Follows a step: run forward under it, call ``begin_backward``, run backward.

    Args:
        degrees: the batch and sequence of this run.

    Attributes:
        timeline: the bytes of all that is made.
        operations: those of all products and of attention, forward and both gradients. Attention counts in full, also
            where it is causal. A product with a compact weight counts its active share, as compact terms.
        dense_operations: the operations if every weight were dense.
    """

    def __init__(self, degrees: Degrees) -> None:
        super().__init__()
        self.degrees = degrees
        self.timeline = Timeline()
        self.operations: dict[Term, float] = {}
        self.dense_operations: dict[Term, float] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._unpacked_densities: dict[int, float] = {}
        self._products: dict[int, tuple[float, Term]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _run(func, args, kwargs or {})
        read = [_key(tensor) for tensor in tree_iter(args) if isinstance(tensor, Tensor)]
        packet = func.overloadpacket
        is_pack = packet is torch.ops.smet.pack
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and _key(tensor) not in read:
                self._record(tensor, is_pack or packet is torch.ops.smet.sampled_matmul)
        if packet in _COMPACT_PRODUCTS:
            self._count_compact(args[0], Layout.from_text(args[4]), _COMPACT_PRODUCTS[packet](args))
        elif packet is torch.ops.smet.unpack:
            self._unpacked_densities[_key(out)] = args[0].shape[0] / Layout.from_text(args[3]).num_blocks
        elif is_pack:
            self._count_packed(read[0], args[4] / Layout.from_text(args[3]).num_blocks)
        else:
            self._count(packet, args, kwargs or {}, out, read)
        return out

    def begin_backward(self) -> None:
        self.timeline.begin_backward()

    def _record(self, tensor: Tensor, is_compact: bool) -> None:
        """Adds the storage of a new tensor to the timeline, and removes it when it dies."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive and self._alive[key]() is not None:
            return
        num_bytes, term = _bytes_of(tensor, self.degrees)
        if is_compact:
            term = Term(0, 0, compact=True)

        def died(_: Any) -> None:
            self.timeline.remove(num_bytes, term)
            self._unpacked_densities.pop(key, None)
            self._products.pop(key, None)
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, died)
        self.timeline.add(num_bytes, term)

    def _count(self, packet: Any, args: Any, kwargs: Any, out: Any, read: list[int]) -> None:
        count = _num_operations(packet, args, kwargs, out)
        if not count:
            return
        coefficient, term = self.degrees.of_product(count)
        densities = [self._unpacked_densities[key] for key in read if key in self._unpacked_densities]
        _add(self.dense_operations, term, coefficient)
        if densities:
            _add(self.operations, term._replace(compact=True), coefficient * densities[0])
        else:
            _add(self.operations, term, coefficient)
            if isinstance(out, Tensor):
                self._products[_key(out)] = coefficient, term

    def _count_compact(self, tokens: Tensor, layout: Layout, num_active: int) -> None:
        """Counts the active share of a product with a compact weight, or of its weight gradient.

        A token is multiplied by one matrix, also where there are several.
        """
        num_tokens, of_matrix = math.prod(tokens.shape[:-1]), layout.num_weights // layout.num_matrices
        coefficient, term = self.degrees.of_product(2 * num_tokens * of_matrix)
        _add(self.dense_operations, term, coefficient)
        _add(self.operations, term._replace(compact=True), coefficient * num_active / layout.num_blocks)

    def _count_packed(self, gradient: int, density: float) -> None:
        """Counts only the active share of a product that is packed: it was the gradient of a compact weight."""
        coefficient, term = self._products.pop(gradient, (0.0, Term(0, 0)))
        _add(self.operations, term, -coefficient)
        _add(self.operations, term._replace(compact=True), coefficient * density)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Calls ``func``; a grouped product runs in bf16, the only dtype for which torch knows its shapes."""
    if func.overloadpacket is not _aten._grouped_mm or args[0].dtype == torch.bfloat16:
        return func(*args, **kwargs)
    first, second, *others = args
    return func(first.bfloat16(), second.bfloat16(), *others, **kwargs).to(first.dtype)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes_of(tensor: Tensor, degrees: Degrees) -> tuple[float, Term]:
    """Reads bytes off the shape, or off the storage where the tensor is a part of it or expanded."""
    num_bytes = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() == num_bytes:
        coefficient, term = degrees.of_shape(tensor.shape)
        return coefficient * tensor.element_size(), term
    return degrees.of_product(num_bytes)


def _num_operations(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Returns the operations of one call, 0 for what is neither a product nor attention."""
    from torch.utils.flop_counter import (  # imports triton
        flop_registry,
        sdpa_backward_flop_count,
        sdpa_flop_count,
    )

    if packet is _aten._grouped_mm:
        return 2 * int(args[0].numel()) * int(args[1].shape[-1])
    if packet is _ATTENTION:
        return int(sdpa_flop_count(*(each.shape for each in args[:3])))
    if packet is _ATTENTION_BACKWARD:
        return int(sdpa_backward_flop_count(*(each.shape for each in args[:4])))
    counted = flop_registry.get(packet)
    return 0 if counted is None else int(counted(*args, **kwargs, out_val=out))


def _add(amount: dict[Term, float], term: Term, coefficient: float) -> None:
    if coefficient:
        amount[term] = amount.get(term, 0.0) + coefficient
