"""Gives the linear weights of an exported model the tensors that torch's sparse products take."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.sparse import to_sparse_semi_structured

from smet_compile.format import Layout

ExportLayout = Literal["2:4", "bsr", "csr"]
EXPORT_LAYOUTS: tuple[str, ...] = get_args(ExportLayout)
_ROWS_OF_2_4, _COLS_OF_2_4 = 32, 64
"""The sizes of 16-bit weights that both of torch's backends take are multiples of these."""
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Exported:
    """Names a weight that was compact and is dense now."""

    name: str
    module: nn.Module
    tensor_name: str
    layout: Layout

    @property
    def dense(self) -> Tensor:
        return self.module.get_parameter(self.tensor_name).detach()

    @property
    def is_linear(self) -> bool:
        """Tells whether only ``F.linear`` reads the weight, which takes sparse ones."""
        module = self.module
        if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
            return False
        return type(module).forward is nn.Linear.forward and self.tensor_name == "weight"


def convert(weights: Sequence[Exported], layout: str) -> None:
    """Replaces the weights of linear layers, in place; warns of the others, which stay dense."""
    linear = [weight for weight in weights if weight.is_linear]
    if weights and not linear:
        raise ValueError(
            f'export_dense: expected a compact weight in an nn.Linear for layout="{layout}", got none; leave layout out'
        )
    for weight in linear:
        _CHECKS[layout](weight)
    for weight in linear:
        converted = _CONVERSIONS[layout](weight)
        weight.module.register_parameter(weight.tensor_name, nn.Parameter(converted, requires_grad=False))
    for message in _warnings(weights, layout):
        warnings.warn(f"export_dense: {message}", stacklevel=4)


def _warnings(weights: Sequence[Exported], layout: str) -> Iterator[str]:
    """Yields what somebody who asked for ``layout`` may not expect."""
    others = [weight.name for weight in weights if not weight.is_linear]
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    if others:
        yield f'{", ".join(others[:3])}{more} stay dense with layout="{layout}", since not only linear layers read them'
    if not weights:
        yield f'every weight stays dense with layout="{layout}", since none is compact in a model of density 1'
    half = [w.name for w in weights if w.is_linear and w.dense.dtype in _HALF and not w.dense.is_cuda]
    if half and layout != "2:4":
        yield f"torch has no CPU product for {half[0]} in {layout} and 16 bits; move the copy to a GPU, or to float32"


def _check_2_4(weight: Exported) -> None:
    """Raises ValueError for a weight that ``to_sparse_semi_structured`` does not take."""
    name, dense, rows, cols = weight.name, weight.dense, weight.layout.rows, weight.layout.cols
    if rows % _ROWS_OF_2_4 or cols % _COLS_OF_2_4:
        raise ValueError(
            f'{name}: expected a multiple of {_ROWS_OF_2_4} rows and of {_COLS_OF_2_4} columns for layout="2:4", got '
            f"{rows} x {cols}; leave this weight dense with exclude= in sparsify"
        )
    if dense.is_cuda and dense.dtype not in _HALF:
        raise ValueError(
            f'{name}: expected float16 or bfloat16 for layout="2:4", got {dense.dtype}; convert the model with '
            "model.to(torch.bfloat16)"
        )
    most = int((dense != 0).view(-1, 4).sum(1).max())
    if most > 2:
        raise ValueError(
            f'{name}: expected at most 2 nonzero weights in every 4 along a row for layout="2:4", got {most}; make the '
            'model sparse with pattern="2:4"'
        )


def _check_bsr(weight: Exported) -> None:
    layout = weight.layout
    (rows, cols), (bm, bn) = layout.matrix, layout.block_shape
    if layout.single_weights:
        raise ValueError(f'{weight.name}: expected blocks for layout="bsr", got single weights; pass layout="csr"')
    if bm != bn:
        raise ValueError(
            f'{weight.name}: expected square blocks for layout="bsr", got {bm} x {bn}; pass layout="csr", or take '
            "square blocks"
        )
    if rows % bm or cols % bn:
        raise ValueError(
            f'{weight.name}: expected blocks that divide the weight for layout="bsr", got {bm} x {bn} for '
            f'{rows} x {cols}; pass layout="csr", or take other blocks'
        )


def _semi_structured(weight: Exported) -> Tensor:
    """Returns the semi-structured tensor on a GPU; elsewhere, where torch has none, the dense one that was checked."""
    dense = weight.dense.contiguous()
    return to_sparse_semi_structured(dense) if dense.is_cuda else dense


_CHECKS = {"2:4": _check_2_4, "bsr": _check_bsr, "csr": lambda weight: None}
_CONVERSIONS = {
    "2:4": _semi_structured,
    "bsr": lambda weight: weight.dense.to_sparse_bsr(weight.layout.block_shape),
    "csr": lambda weight: weight.dense.to_sparse_csr(),
}
