"""Follows an eager training step on fake tensors: what is made and when it dies, and how many operations that takes."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from smet_compile.format import Layout
from smet_compile.plan.degrees import Degrees, Term
from smet_compile.plan.timeline import Timeline

_aten = torch.ops.aten
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward


class EagerStep(TorchDispatchMode):
    """Run forward under it, call ``begin_backward``, run backward.

    Args:
        degrees: the batch and sequence of this run.

    Attributes:
        timeline: bytes of all that is made.
        operations: of all products and attention (in full, also where it is causal), forward and both gradients; of a
            product with a compact weight the active share, as compact terms.
        dense_operations: the same as if every weight were dense.
    """

    def __init__(self, degrees: Degrees) -> None:
        super().__init__()
        self.degrees = degrees
        self.timeline = Timeline()
        self.operations: dict[Term, float] = {}
        self.dense_operations: dict[Term, float] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._unpacked: dict[int, float] = {}
        self._products: dict[int, tuple[float, Term]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _run(func, args, kwargs or {})
        made_here = [tensor for tensor in tree_iter(out) if isinstance(tensor, Tensor)]
        read = [_key(tensor) for tensor in tree_iter(args) if isinstance(tensor, Tensor)]
        packet = func.overloadpacket
        compact = packet is torch.ops.smet.pack
        for tensor in made_here:
            if _key(tensor) not in read:
                self._made(tensor, compact)
        if packet is torch.ops.smet.unpack:
            self._unpacked[_key(out)] = args[0].shape[0] / Layout.from_text(args[3]).num_blocks
        elif compact:
            self._count_for_site(read[0], args[4] / Layout.from_text(args[3]).num_blocks)
        else:
            self._count(packet, args, kwargs or {}, out, read)
        return out

    def begin_backward(self) -> None:
        self.timeline.begin_backward()

    def _made(self, tensor: Tensor, compact: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive and self._alive[key]() is not None:
            return
        held = _bytes_of(tensor, self.degrees)
        if compact:
            held = (held[0], Term(0, 0, compact=True))

        def died(_: Any) -> None:
            self.timeline.remove(*held)
            self._unpacked.pop(key, None)
            self._products.pop(key, None)
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, died)
        self.timeline.add(*held)

    def _count(self, packet: Any, args: Any, kwargs: Any, out: Any, read: list[int]) -> None:
        count = _operations(packet, args, kwargs, out)
        if not count:
            return
        coefficient, term = self.degrees.of_product(count)
        densities = [self._unpacked[key] for key in read if key in self._unpacked]
        _add(self.dense_operations, term, coefficient)
        if densities:
            _add(self.operations, term._replace(compact=True), coefficient * densities[0])
        else:
            _add(self.operations, term, coefficient)
            if isinstance(out, Tensor):
                self._products[_key(out)] = coefficient, term

    def _count_for_site(self, gradient: int, density: float) -> None:
        """A product that is packed was the gradient of a compact weight."""
        coefficient, term = self._products.pop(gradient, (0.0, Term(0, 0)))
        _add(self.operations, term, -coefficient)
        _add(self.operations, term._replace(compact=True), coefficient * density)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """``func`` of these; a grouped product, whose shapes torch knows in bf16 alone, as if it were one in bf16."""
    if func.overloadpacket is not _aten._grouped_mm or args[0].dtype == torch.bfloat16:
        return func(*args, **kwargs)
    first, second, *others = args
    return func(first.bfloat16(), second.bfloat16(), *others, **kwargs).to(first.dtype)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes_of(tensor: Tensor, degrees: Degrees) -> tuple[float, Term]:
    """By the shape, unless the tensor is a part of what it lies in, or is expanded."""
    num_bytes = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() == num_bytes:
        coefficient, term = degrees.of(tensor.shape)
        return coefficient * tensor.element_size(), term
    return degrees.of_product(num_bytes)


def _operations(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Of one call. Imported here: counting imports triton, and the library is light until somebody plans."""
    from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

    if packet is _ATTENTION:
        return int(sdpa_flop_count(*(each.shape for each in args[:3])))
    if packet is _ATTENTION_BACKWARD:
        return int(sdpa_backward_flop_count(*(each.shape for each in args[:4])))
    counted = flop_registry.get(packet)
    return 0 if counted is None else int(counted(*args, **kwargs, out_val=out))


def _add(amount: dict[Term, float], term: Term, coefficient: float) -> None:
    if coefficient:
        amount[term] = amount.get(term, 0.0) + coefficient
