"""Defines CompactWeight, the parametrization that lets a module read its compact weight as a dense tensor.

``torch.nn.utils.parametrize`` keeps ``values`` as the parameter ``parametrizations.<name>.original``, and calls
``forward`` at each read of ``module.<name>`` and ``right_inverse`` at each assignment to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from smet_compile.format import (
    Layout,
    Part,
    Topology,
    digest_bits,
    empty_lists,
    pack_bits,
    slabs,
    unpack_bits,
    write_lists,
)
from smet_compile.format.user_warning import warn_user
from smet_compile.ops import captures, gate, growth, loading, open_sinks, reads, saved_weights
from smet_compile.ops.growth import Collected
from smet_compile.ops.torch_insides import is_exporting, replace_data
from smet_compile.shards import is_sharded, local

_FOR_ONE_STEP = {"update_sink": None, "collected": None, "is_collected": False, "reduced_over": ""}
_FOR_ONE_OBJECT = dict.fromkeys(("write_error", "stand_in", "_active"))
"""Attributes that a copy does not have."""
_IS_KNOWN = "is_known"
_NO_DATA = (
    "has no data yet (to_empty gives memory that nobody wrote); load a state dict or a checkpoint, or draw weights "
    "with smet_compile.materialize(model, seed=...)"
)
_EXPORTED = (
    "expected a dense weight to export to another format, got a compact one, which only this library reads; export "
    "the copy that smet_compile.export_dense(model) makes"
)
_WRITTEN = (
    "its topology was written from outside, by an average of models, say, which would add up rows that belong to "
    "different weights. Average dense weights: AveragedModel(export_dense(model)) and "
    "update_parameters(export_dense(model)). Copy a model with load_state_dict"
)


class CompactWeight(nn.Module):
    """Converts values to a dense weight (``forward``) and back (``right_inverse``), for one site.

    It has two buffers. ``topology``, one bit per block, is saved in checkpoints. ``lists``, which kernels read
    (``format.Topology``), is derived from it and rebuilt after every load. Both are checked (``ops.gate``) before a
    kernel receives them, and again after every change in place.

    Args:
        layout: how the weight is cut into blocks.
        mask: (num_blocks,) bool, the active blocks; without data on the meta device.
        num_active: number of true entries of ``mask``.
        name: the name of the weight, for errors.
    """

    topology: Tensor
    lists: Tensor
    parameter_order: list[str]
    """Names of the module's parameters, in the order they had when this one was dense."""
    pattern: str | None = None
    """Restricts which blocks may be active (``format.patterns``); None in what older versions pickled, too."""
    part: Part | None = None
    """Says where the weight lies in one that tensor parallelism has cut; None where it is whole."""
    select: str
    rescale: bool
    """How ``sparsify`` chose the active blocks and whether it scaled them; ``materialize`` does the same."""
    num_changes: int = 0
    """Counts topologies and, of shards, optimizer steps, so that backward notices a change since forward."""
    fingerprint: int | None
    """The fingerprint of the topology that the rows of the values belong to; None before there is one."""
    update_sink: tuple[Tensor, Tensor, Tensor] | None
    """In a step whose update is fused: the parameter, what its reads take, which needs no gradient, and their sink."""
    collected: Collected | None
    """Buffers in which backward collects the dense gradient; None unless a policy asks for that of this step."""
    is_collected: bool = False
    """Whether a policy asks for the dense gradient of some steps, this one or later ones."""
    reduced_over: str
    """Names of the process groups over which backward averages that gradient; empty for none."""
    write_error: BaseException | None
    """An error from a change in place that could not be kept; the next use raises it."""
    _active: Topology | None
    """The topology that was checked last; None before the first check, and on the meta device."""
    scales_rows: bool = False
    """Whether backward multiplies the gradient of each row by the root of its relative fan-in (``ops.row_scale``)."""
    scales_steps: bool = False
    """Whether an optimizer's finished steps are multiplied by it instead."""
    takes_stages: bool = False
    """Whether a state dict of another density stage is loaded: the weight then takes the number of blocks in it."""
    correction: str | None = None
    """Says whether ``correct_gradients`` found that it should, and why not; None before it looked."""
    stand_in: Callable[[], Tensor] | None
    """Returns a dense tensor that is read instead, while the weight is initialised."""

    def __init__(self, layout: Layout, mask: Tensor, num_active: int, name: str = "weight") -> None:
        super().__init__()
        self.layout = layout
        self.num_active = num_active
        self.name = name
        self.parameter_order = []
        self.select, self.rescale = "random", False
        self.fingerprint, self.num_changes = None, 0
        self.__dict__.update(_FOR_ONE_STEP | _FOR_ONE_OBJECT)
        self.register_buffer("topology", pack_bits(mask))
        self.register_buffer("lists", empty_lists(layout, num_active, torch.device("meta")), persistent=False)
        self._accept()

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; a topology that is assigned is checked, and becomes that of the values."""
        assigned = name == "topology" and isinstance(value, Tensor) and not gate.is_traced(value)
        if assigned and (error := self.topology_error(value)):
            raise ValueError(f"{self.name}: topology: {error}")
        super().__setattr__(name, value)
        if assigned:
            self._accept()

    def extra_repr(self) -> str:
        return self.layout.describe(self.num_active, self.pattern)

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the dense weight."""
        return self.layout.shape

    def mask(self) -> Tensor:
        """Returns the mask (num_blocks,) bool of the active blocks, row-major."""
        self.check()
        return unpack_bits(self.topology, self.layout.num_blocks)

    @property
    def active(self) -> Topology:
        """Returns the checked topology, with the lists that kernels read."""
        self.check()
        if self._active is not None and self.is_still(self._active):
            return self._active
        return gate.find(self.topology, self.lists, self.layout.text, self.num_active)

    def _is_checked(self) -> bool:
        """Returns whether bits and lists were checked, here or in the weight ``functional_call`` took them from."""
        if self.is_still(self._active):
            return True
        return gate.is_admitted(self.topology, self.lists, self.layout.text, self.num_active)

    def is_still(self, topology: Topology | None) -> bool:
        """Tells whether ``topology`` is the one that was checked last, with bits and lists unchanged.

        Every optimizer step calls it, so it avoids the slow ``nn.Module.__getattr__``.
        """
        buffers = self._buffers
        return (
            topology is not None
            and topology is self._active
            and topology.bits is buffers["topology"]
            and topology.lists is buffers["lists"]
            and topology.is_unchanged()
        )

    def set_mask(self, mask: Tensor) -> None:
        """Changes the active blocks in place; their number and the storage stay the same."""
        self.set_bits(pack_bits(mask))

    def set_bits(self, bits: Tensor) -> None:
        """Changes the active blocks in place, to those of bits (ceil(num_blocks / 8),) uint8."""
        if error := self.topology_error(bits):
            raise ValueError(f"{self.name}: {error}")
        self.topology.copy_(bits)
        self._accept()

    def topology_error(self, bits: Tensor) -> str | None:
        """Says why ``bits`` cannot be this weight's topology, by their form or by its pattern; None where they can."""
        error = gate.topology_error(bits, self.layout, self.num_active)
        if error is not None or bits.is_meta or (self.pattern is None and self.layout.slabs is None):
            return error
        return slabs.mask_error(unpack_bits(bits, self.layout.num_blocks), self.pattern, self.layout)

    def has_data(self) -> bool:
        """Tells whether there is a topology that the values belong to."""
        topology = self.topology
        if gate.is_traced(topology) or self.fingerprint is None:
            return False
        if self._is_checked():
            return True
        error = gate.topology_error(topology, self.layout, self.num_active)
        return error is None and digest_bits(topology)[1] == self.fingerprint

    def check(self) -> None:
        """Writes changes of reads back to the values, and raises ValueError where the topology cannot be used.

        That is so before there is one (a model from the meta device, ``to_empty``), and after others wrote into it.
        """
        if torch.compiler.is_compiling():
            return
        reads.settle_before_use(self)
        if not (self.fingerprint is not None and self._is_checked()) and not gate.is_traced(self.topology):
            self._check_again()

    def _check_again(self) -> None:
        """Checks a topology that was replaced or written since the last check; the same bits elsewhere pass."""
        if self.fingerprint is None:
            raise ValueError(f"{self.name}: {_NO_DATA}")
        if not self.has_data():
            raise ValueError(f"{self.name}: {_WRITTEN if gate.is_owned(self.topology) else _NO_DATA}")
        self._derive()

    def _accept(self) -> None:
        """Makes the topology, which was checked, the one that the values belong to."""
        self.__dict__["num_changes"] = self.num_changes + 1
        if not self.topology.is_meta:
            self.fingerprint = digest_bits(self.topology)[1]
        self._derive()

    def _derive(self) -> None:
        """Derives the lists from the topology again: in place, unless their device or shape has to change."""
        expected = empty_lists(self.layout, self.num_active, torch.device("meta"))
        lists, same = self.lists, (expected.dtype, expected.shape, self.topology.device)
        if (lists.dtype, lists.shape, lists.device) != same or not lists.is_contiguous():
            self.lists = torch.empty_like(expected, device=self.topology.device)
        if not self.topology.is_meta:
            write_lists(self.lists, self.topology, self.layout)
            gate.belongs_to(self.topology, self._check_again)
            topology = Topology(self.layout, self.topology, self.lists, self.num_active)
            self.__dict__["_active"] = topology
            gate.admit(topology)

    def forward(self, values: Tensor) -> Tensor:
        if self.stand_in is not None:
            return self.stand_in()
        if self.topology.is_meta and not values.is_meta:
            raise ValueError(f"{self.name}: {_NO_DATA}")
        tracing = torch.compiler.is_compiling()
        if is_exporting():  # whose formats have no compact weights
            raise ValueError(f"{self.name}: {_EXPORTED}")
        if self.part is not None and (tracing or self.part.holds_all(values)):
            dtensor: Any = values
            here = self._unpack(dtensor.to_local(), tracing)
            dense = self.part.wrap_dense(here)
            return dense if tracing else reads.follow(here, dense)
        if not tracing and is_sharded(values):
            raise ValueError(
                f"{self.name}: expected a whole weight to read, got a shard; export_dense(model) makes a plain model, "
                "and unshard() of the module that was given to fully_shard makes the weight whole until reshard()"
            )
        return self._unpack(values, tracing)

    def _unpack(self, values: Tensor, tracing: bool) -> Tensor:
        self.check()
        if not tracing and torch.is_inference_mode_enabled() and not values.is_inference():
            # Tensors made in inference mode have no version, by which changes in place are noticed.
            with torch.inference_mode(False), torch.no_grad():
                return self._unpack(values, tracing)
        source, sink = self.in_step(values)
        sinks = sink, growth.sink_of(self, values if sink is None else sink, tracing)
        dense = torch.ops.smet.unpack(
            source, self.topology, self.lists, self.layout.text, *sinks, tracing, self.scales_rows
        )
        if not tracing:
            dense = reads.watch(self, values, dense)
            saved_weights.remember(dense, values, self.active, self)
        return dense

    def in_step(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns what a read of ``values`` takes, and its sink, which others than the weight's own do not have."""
        own = open_sinks.sink_of(self)
        return own[1:] if own is not None and values is own[0] else (values, None)

    def right_inverse(self, dense: Tensor) -> Tensor:
        self.check()
        if self.part is not None and is_sharded(dense):
            return self.part.wrap_rows(self.right_inverse(self.part.here(self.name, dense)))
        if tuple(dense.shape) != self.layout.shape:
            raise ValueError(
                f"{self.name}: expected a weight of shape {self.layout.shape}, got {tuple(dense.shape)}; "
                "assign one of the dense shape"
            )
        try:
            return torch.ops.smet.pack(dense, self.topology, self.lists, self.layout.text, self.num_active)
        except NotImplementedError as error:
            if type(dense) in (Tensor, nn.Parameter):
                raise
            raise ValueError(
                f"{self.name}: expected a plain tensor to assign, got a {type(dense).__name__}; quantize the copy that "
                "smet_compile.export_dense(model) makes"
            ) from error

    @torch.no_grad()
    def assign(self, values: Tensor, dense: Tensor) -> bool:
        """Writes a dense weight that is cut as this one is to the values; returns whether all of them are here."""
        if self.part is None or not self.part.holds_all(values):
            return False
        local(values).copy_(local(self.right_inverse(dense.detach())))
        return True

    @torch.no_grad()
    def replace(self, values: Tensor, dense: Tensor) -> None:
        """Makes ``dense`` the weight, for ``module.weight.data = dense``.

        If it is not zero outside the active blocks (an adapter was merged, say), all blocks become active, with a
        warning. Raises ValueError for another shape, dtype or device than the weight's.
        """
        if (tuple(dense.shape), dense.dtype, dense.device) != (self.layout.shape, values.dtype, values.device):
            raise ValueError(
                f"{self.name}: expected data of {values.dtype}, shape {self.layout.shape} on {values.device}, got "
                f"{dense.dtype}, {tuple(dense.shape)} on {dense.device}; convert the model with model.to(...)"
            )
        new = self.right_inverse(dense.detach())
        if int(dense.count_nonzero()) == int(new.count_nonzero()):
            values.copy_(new)
            return
        warn_user(
            f"{self.name}: the data that the weight was given has numbers where no block was active; it keeps every "
            "block from now on, in as much memory as a dense weight. Assign to the weight itself, without .data, to "
            "keep the active part alone"
        )
        everything = torch.ones(self.layout.num_blocks, dtype=torch.bool, device=self.topology.device)
        dense, self.pattern = dense.detach(), None
        self.resize(values, everything)
        values.copy_(self.right_inverse(dense))

    @torch.no_grad()
    def resize(self, values: Tensor, mask: Tensor, rows: Tensor | None = None) -> None:
        """Makes the blocks of ``mask`` active, however many, with ``rows`` as values; sets their gradient to None.

        The values are zero where ``rows`` is None.
        """
        slabs.check_mask(self.name, mask, self.pattern, self.layout)
        num_active, bits = int(mask.sum()), pack_bits(mask)
        rows = values.new_zeros(self.layout.values_shape(num_active)) if rows is None else rows
        lists = empty_lists(self.layout, num_active, self.topology.device)
        values.grad = None
        captures.warn_of_new_memory([values])
        replace_data(values, rows)
        self.num_active, self.lists = num_active, lists
        self.topology.copy_(bits)
        self._accept()

    def __getstate__(self) -> dict[str, Any]:
        known = gate.is_owned(self.topology)
        return {**super().__getstate__(), **_FOR_ONE_STEP, **_FOR_ONE_OBJECT, _IS_KNOWN: known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        known = state.pop(_IS_KNOWN, False)
        super().__setstate__(state)
        if known and not self.topology.is_meta:
            gate.belongs_to(self.topology, self._check_again)

    def _save_to_state_dict(self, *args: Any) -> None:
        if gate.is_owned(self.topology):  # memory without data may be saved: a state dict can be made to be loaded into
            self.check()
        super()._save_to_state_dict(*args)
        if self.part is not None:
            destination, prefix, *_ = args
            bits = self.part.wrap_rows(destination[f"{prefix}topology"][None])
            destination[f"{prefix}topology"] = bits  # the bits of each part, as a plain tensor would not be

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        bits = state_dict.get(prefix + "topology")
        if bits is self.topology:  # others were refused (``loading``)
            return
        error = loading.misfit(self, bits, loading.name_of(prefix.removesuffix("0.")))
        if error is not None:
            args[-1].append(error)
            return
        if bits is not None:
            state_dict = {**state_dict, prefix + "topology": loading.bits_here(self, bits)}
        super()._load_from_state_dict(state_dict, prefix, *args)
        if bits is not None and not bits.is_meta:
            self._accept()
