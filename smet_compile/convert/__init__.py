"""Where a model becomes sparse, and back: find the weights, share out the density, parametrize, export."""

from smet_compile.convert.choose import Globs, check_choice, check_density, choose
from smet_compile.convert.compact import make_compact
from smet_compile.convert.export import export_dense
from smet_compile.convert.materialize import materialize
from smet_compile.convert.report import Report, remember_reasons, report

__all__ = [
    "Globs",
    "Report",
    "check_choice",
    "check_density",
    "choose",
    "export_dense",
    "make_compact",
    "materialize",
    "remember_reasons",
    "report",
]
