"""Decides where a model becomes sparse: finds the weights, shares out the density, makes them compact, and exports."""

from smet_compile.convert.active_blocks import describe_empty_rows
from smet_compile.convert.choose import Choice, Globs, choose
from smet_compile.convert.compact import draw, make_compact
from smet_compile.convert.export import export_dense
from smet_compile.convert.masks import masks
from smet_compile.convert.materialize import materialize
from smet_compile.convert.pretrained import save_dense
from smet_compile.convert.report import Report, report

__all__ = [
    "Choice",
    "Globs",
    "Report",
    "choose",
    "describe_empty_rows",
    "draw",
    "export_dense",
    "make_compact",
    "masks",
    "materialize",
    "report",
    "save_dense",
]
