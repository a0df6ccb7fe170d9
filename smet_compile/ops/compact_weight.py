"""CompactWeight: the parametrization through which a module goes on reading its weight as a dense tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.format import Layout, count_active, empty_index, pack_bits, unpack_bits, write_index
from smet_compile.ops import saved_weights

_OF_A_STEP = dict.fromkeys(("update_sink", "candidates"))


class CompactWeight(nn.Module):
    """values → dense weight (``forward``) and back (``right_inverse``), for one site.

    Its buffers: ``topology``, one bit per block, the truth and what a checkpoint holds; and ``lists``, what kernels
    want of it (``format.Index``), derived from it and rebuilt after every load.

    Args:
        layout: how the weight is cut into blocks.
        mask: (num_blocks,) bool, the active blocks; on the meta device only its count is known.
        num_active: number of true entries of ``mask``.
    """

    topology: Tensor
    lists: Tensor
    parameter_order: list[str]
    """Names of the module's parameters, in the order they had when this one was dense."""
    update_sink: Tensor | None
    """Where the gradient of every read goes instead of to the values, within a step whose update is fused."""
    candidates: Tensor | None
    """Filled in backward with the inactive blocks of largest gradient, where somebody asks for them."""

    def __init__(self, layout: Layout, mask: Tensor, num_active: int) -> None:
        super().__init__()
        self.layout = layout
        self.num_active = num_active
        self.parameter_order = []
        self.__dict__.update(_OF_A_STEP)
        self.register_buffer("topology", pack_bits(mask))
        self.register_buffer("lists", empty_index(layout, num_active, torch.device("meta")), persistent=False)
        self._derive()

    def mask(self) -> Tensor:
        """(num_blocks,) bool: the active blocks, row-major."""
        return unpack_bits(self.topology, self.layout.num_blocks)

    @property
    def index(self) -> list[Tensor]:
        """The lists derived from the topology, for kernels."""
        return [self.lists]

    def set_mask(self, mask: Tensor) -> None:
        """Moves the active set, in place: same number of blocks, same storage."""
        self.topology.copy_(pack_bits(mask))
        self._derive()

    def _derive(self) -> None:
        """Rewrites what follows from the topology: in place, unless the topology came to another device."""
        if self.lists.device != self.topology.device:
            self.lists = torch.empty_like(self.lists, device=self.topology.device)
        if not self.topology.is_meta:
            write_index(self.lists, self.topology, self.layout)

    def op_layout(self) -> tuple[list[int], list[int], list[int]]:
        """The layout as the ops take it."""
        return list(self.layout.shape), list(self.layout.matrix), list(self.layout.block_shape)

    def forward(self, values: Tensor) -> Tensor:
        tracing = torch.compiler.is_compiling()
        sinks = self.update_sink, self._growth_sink(values)
        dense = torch.ops.smet.unpack(values, self.topology, self.index, *self.op_layout(), *sinks, tracing)
        if not tracing:
            saved_weights.remember(self, values, dense)
        return dense

    def _growth_sink(self, values: Tensor) -> Tensor | None:
        """Where the dense gradient goes, if somebody asks for candidates and there will be one."""
        leaf = values if self.update_sink is None else self.update_sink
        if self.candidates is None or not leaf.requires_grad:
            return None
        sink: Tensor = torch.ops.smet.growth_sink(leaf, self.candidates, self.topology, *self.op_layout())
        return sink

    def right_inverse(self, dense: Tensor) -> Tensor:
        return torch.ops.smet.pack(dense, self.topology, self.index, *self.op_layout(), self.num_active)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **_OF_A_STEP}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        error = self._misfit(state_dict.get(prefix + "topology"), prefix)
        if error is not None:
            args[-1].append(error)
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._derive()

    def _misfit(self, bits: Tensor | None, prefix: str) -> str | None:
        """Why ``bits`` cannot be this weight's topology; None where they can."""
        if bits is None or bits.is_meta:
            return None
        name = prefix.replace(".parametrizations", "").removesuffix(".0.")
        if bits.dtype != torch.uint8 or bits.shape != self.topology.shape:
            want, got = f"uint8 {tuple(self.topology.shape)}", f"{bits.dtype} {tuple(bits.shape)}"
            return f"{name}: expected a topology of {want}, got {got}; sparsify with the same block_shape"
        if count_active(bits) != self.num_active:
            return (
                f"{name}: expected a topology of {self.num_active} active blocks, got {count_active(bits)}; "
                "sparsify with the same density"
            )
        return None
