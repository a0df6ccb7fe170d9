"""Rules for ops that keep every unit where it is: elementwise ones, norms, softmax."""

from __future__ import annotations

from collections.abc import Callable

from smet_compile.microscope.combine import combine, or_else
from smet_compile.microscope.reading import Reading, short_name
from smet_compile.microscope.recorder import Call, Ref
from smet_compile.microscope.units import Units, Value, Weight, single

KEEP_ZERO = (
    "abs", "alias", "asinh", "atan", "celu", "clone", "contiguous", "detach", "dropout", "elu", "erf", "expm1",
    "gelu", "hardswish", "leaky_relu", "lift_fresh", "lift_fresh_copy", "log1p", "mish",
    "native_dropout", "neg", "relu", "relu6", "round", "rms_norm", "_fused_rms_norm", "selu", "sgn", "sign",
    "silu", "sin", "sinh", "sqrt", "square", "tan", "tanh", "_to_copy", "trunc",
)  # fmt: skip
"""f(0) = 0."""
SHIFT = (
    "softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "native_layer_norm",
    "native_group_norm", "native_batch_norm", "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "_batch_norm_no_update",
    "cudnn_batch_norm", "miopen_batch_norm",
)  # fmt: skip
"""What each unit becomes depends on the others too, by a mean and a scale: no path is followed through those."""
BOUNDS = ("min", "min_val"), ("max", "max_val")
PRODUCTS = ("mul", "multiply")
QUOTIENTS = ("div", "divide", "true_divide")


def keep(reading: Reading, call: Call) -> list[Value]:
    """The first result is the first argument, another dtype perhaps; the others are masks and statistics."""
    rest = [single(reading.flow.CONSTANT, ref.shape) for ref in call.outputs[1:]]
    return [reading.value(call.args[0]), *rest]


def shift(reading: Reading, call: Call) -> list[Value]:
    """As ``keep``, but zero does not stay zero."""
    if reading.is_site(reading.value(call.args[0])):
        return [reading.opaque(call)] * len(call.outputs)
    value, constant = reading.units(call.args[0]), single(reading.flow.CONSTANT, ())
    rest = [single(reading.flow.CONSTANT, ref.shape) for ref in call.outputs[1:]]
    return [combine(reading.flow, "sum", [value, constant], call.outputs[0].shape), *rest]


def pointwise(reading: Reading, call: Call) -> Value | list[Value]:
    """Any elementwise op: its results have units where an operand has them."""
    operands = [reading.value(arg) for arg in (*call.args, *call.kwargs.values()) if isinstance(arg, Ref)]
    weight = _scaled_weight(reading, call, operands)
    if weight is not None:
        return weight
    if any(reading.is_site(value) for value in operands):
        return reading.opaque(call)
    return _ELEMENTWISE.get(short_name(call), _any_of_all)(reading, call)


def _scaled_weight(reading: Reading, call: Call, operands: list[Value]) -> Weight | None:
    """The one matrix among the operands, scaled or in another dtype; a compact one as long as zero stays zero."""
    weights = [value for value in operands if isinstance(value, Weight)]
    others = [value for value in operands if isinstance(value, Units)]
    if len(weights) != 1 or tuple(weights[0].rows.shape) != call.outputs[0].shape or weights[0].chosen:
        return None
    name = short_name(call)
    keeps_zero = name in (*KEEP_ZERO, *PRODUCTS) or (name in QUOTIENTS and operands[0] is weights[0])
    known = keeps_zero or not reading.is_site(weights[0])
    return weights[0] if known and all(value.node == reading.flow.CONSTANT for value in others) else None


def _any_of_all(reading: Reading, call: Call) -> Value:
    operands = [reading.units(arg) for arg in (*call.args, *call.kwargs.values()) if isinstance(arg, Ref)]
    constant = single(reading.flow.CONSTANT, ())
    return combine(reading.flow, "sum", [*operands, constant], call.outputs[0].shape)


def _sum(*positions: int) -> Callable[[Reading, Call], Units]:
    """Of the arguments at ``positions``; zero where all of them are."""

    def rule(reading: Reading, call: Call) -> Units:
        values = [reading.units(call.args[i]) for i in positions]
        return combine(reading.flow, "sum", values, call.outputs[0].shape)

    return rule


def _product(reading: Reading, call: Call) -> Value:
    values = [reading.units(arg) for arg in call.args[:2]]
    return combine(reading.flow, "product", values, call.outputs[0].shape)


def _quotient(reading: Reading, call: Call) -> Value:
    """Zero where the dividend is; the divisor is none."""
    dividend, divisor = (reading.units(arg) for arg in call.args[:2])
    constant = single(reading.flow.CONSTANT, ())
    nonzero = combine(reading.flow, "sum", [divisor, constant], tuple(divisor.labels.shape))
    return combine(reading.flow, "product", [dividend, nonzero], call.outputs[0].shape)


def _where(reading: Reading, call: Call) -> Value:
    """One or the other. Where both are constant, what it says is in the choice."""
    made, chosen_by = _sum(1, 2)(reading, call), reading.units(call.args[0])
    return or_else(reading.flow, made, chosen_by)


def _masked_fill(reading: Reading, call: Call) -> Value:
    made, chosen_by = _sum(0, 2)(reading, call), reading.units(call.args[1])
    return or_else(reading.flow, made, chosen_by)


def _clamp(reading: Reading, call: Call) -> Value | list[Value]:
    """Zero stays zero where it lies between the bounds."""
    names = [argument.name for argument in call.op._schema.arguments]
    bounds = call.kwargs | dict(zip(names[1:], call.args[1:], strict=False))
    low, high = (next((bounds[name] for name in pair if bounds.get(name) is not None), 0) for pair in BOUNDS)
    keeps = isinstance(low, int | float) and isinstance(high, int | float) and low <= 0 <= high
    return keep(reading, call) if keeps else _any_of_all(reading, call)


def _power(reading: Reading, call: Call) -> Value | list[Value]:
    keeps = isinstance(call.args[1], int | float) and call.args[1] > 0
    return keep(reading, call) if keeps else _any_of_all(reading, call)


def _plus_product(reading: Reading, call: Call) -> Value:
    shape = call.outputs[0].shape
    start, *factors = (reading.units(arg) for arg in call.args[:3])
    return combine(reading.flow, "sum", [start, combine(reading.flow, "product", factors, shape)], shape)


_ELEMENTWISE: dict[str, Callable[[Reading, Call], Value | list[Value]]] = {
    **dict.fromkeys(KEEP_ZERO, keep),
    **dict.fromkeys(("add", "sub", "rsub", "maximum", "minimum", "fmax", "fmin"), _sum(0, 1)),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "hardtanh"), _clamp),
    "where": _where,
    "masked_fill": _masked_fill,
    **dict.fromkeys(PRODUCTS, _product),
    **dict.fromkeys(QUOTIENTS, _quotient),
    "pow": _power,
    "addcmul": _plus_product,
}
