"""What a training run costs: bytes by kind and operations, exactly or on shapes alone, as numbers and as formulas."""

from smet_compile.plan.compiled import compiled_timeline
from smet_compile.plan.degrees import Degrees, telling_degrees
from smet_compile.plan.eager import EagerStep
from smet_compile.plan.formulas import Formulas, Shares, expression, rounding_bytes
from smet_compile.plan.repeats import Repeats, find_repeats, shortened
from smet_compile.plan.result import Cost, Plan
from smet_compile.plan.sizes import bytes_text, parse_bytes
from smet_compile.plan.stored import Recipe, Stored, resident_bytes, total_bytes
from smet_compile.plan.timeline import Amount, Point, Stack, Timeline, weighted_sum

__all__ = [
    "Amount",
    "Cost",
    "Degrees",
    "EagerStep",
    "Formulas",
    "Plan",
    "Point",
    "Recipe",
    "Repeats",
    "Shares",
    "Stack",
    "Stored",
    "Timeline",
    "bytes_text",
    "compiled_timeline",
    "expression",
    "find_repeats",
    "parse_bytes",
    "resident_bytes",
    "rounding_bytes",
    "shortened",
    "telling_degrees",
    "total_bytes",
    "weighted_sum",
]
