"""Dead units of one weight: inputs and outputs without an active weight.

Shape suffixes: S stacked matrices (R, C) of M block rows and K block columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from smet_compile.microscope.matrices import ActiveMatrix
from smet_compile.ops import Site


@dataclass(frozen=True)
class DeadUnits:
    """Of a stack of S matrices (R, C). Inputs are its columns, outputs its rows; of a module that multiplies with
    its weight from the other side (Hugging Face ``Conv1D``, a lookup), inputs are rows and outputs columns.

    Args:
        inputs: (S C,) bool, those without active weight: what comes there is ignored.
        outputs: (S R,) bool, those without active weight: what comes out is zero, or the bias.
    """

    inputs: Tensor
    outputs: Tensor

    def __bool__(self) -> bool:
        return bool(self.inputs.any() or self.outputs.any())


def matrix_of(site: Site) -> ActiveMatrix:
    """The active blocks of a site. Raises ValueError on the meta device, where a topology has no data."""
    _expect_data(site)
    return ActiveMatrix.of(site.compact.topology, site.layout)


def rows_come_in(site: Site) -> bool:
    """Whether the module multiplies with its weight as (in, out), as far as its class says."""
    classes = {kind.__name__ for kind in type(site.module).__mro__}
    return "Conv1D" in classes or isinstance(site.module, nn.Embedding)


def dead_units(site: Site, rows_are_inputs: bool | None = None) -> DeadUnits:
    """Read from the topology, on the device it is on: linear in its bits. Raises ValueError on the meta device.

    Args:
        rows_are_inputs: how the weight is used; None: as the class of its module says.
    """
    _expect_data(site)
    lay, (bm, bn) = site.layout, site.layout.block_shape
    mask_SMK = site.mask().view(lay.num_matrices, lay.block_rows, lay.block_cols)
    rows = ~mask_SMK.any(2).repeat_interleave(bm, dim=1)[:, : lay.rows].flatten().cpu()
    cols = ~mask_SMK.any(1).repeat_interleave(bn, dim=1)[:, : lay.cols].flatten().cpu()
    turned = rows_come_in(site) if rows_are_inputs is None else rows_are_inputs
    return DeadUnits(rows, cols) if turned else DeadUnits(cols, rows)


def _expect_data(site: Site) -> None:
    if site.compact.topology.is_meta:
        raise ValueError(
            f"{site.name}: expected a topology with data, got one on the meta device; load a checkpoint, or sparsify "
            "the model on another device"
        )
