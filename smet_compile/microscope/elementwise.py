"""Rules for ops that keep every unit where it is: elementwise ones, norms, softmax; and for reductions."""

from __future__ import annotations

from collections.abc import Callable

from smet_compile.microscope.capture import Call, Ref
from smet_compile.microscope.reading import Reading
from smet_compile.microscope.units import Units, Value, Weight, combine, gather, pooled, reshaped, single, varies

KEEP_ZERO = (
    "abs", "alias", "asinh", "atan", "celu", "clone", "contiguous", "detach", "dropout", "elu", "erf", "expm1",
    "gelu", "hardswish", "hardtanh", "leaky_relu", "lift_fresh", "lift_fresh_copy", "log1p", "mish",
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
REDUCTIONS = (
    "sum", "mean", "amax", "amin", "var", "std", "var_mean", "linalg_vector_norm", "norm", "logsumexp", "prod",
    "argmax", "argmin", "nansum",
)  # fmt: skip


def keep(reading: Reading, call: Call) -> list[Value]:
    """The first result is the first argument, another dtype perhaps; the others are masks and statistics."""
    rest = [single(reading.flow.CONSTANT, ref.shape) for ref in call.outputs[1:]]
    return [reading.value(call.args[0]), *rest]


def shift(reading: Reading, call: Call) -> list[Value]:
    """As ``keep``, but zero does not stay zero."""
    value, constant = reading.units(call.args[0]), single(reading.flow.CONSTANT, ())
    rest = [single(reading.flow.CONSTANT, ref.shape) for ref in call.outputs[1:]]
    return [combine(reading.flow, "sum", [value, constant], call.outputs[0].shape), *rest]


def pointwise(reading: Reading, call: Call) -> Value | list[Value]:
    """Any elementwise op: its results have units where an operand has them."""
    operands = [arg for arg in (*call.args, *call.kwargs.values()) if isinstance(arg, Ref)]
    weights = [value for value in map(reading.value, operands) if isinstance(value, Weight)]
    others = [value for value in map(reading.value, operands) if isinstance(value, Units)]
    fits = len(weights) == 1 and tuple(weights[0].rows.shape) == call.outputs[0].shape and not weights[0].chosen
    if fits and all(value.node == reading.flow.CONSTANT for value in others):
        return weights[0]  # scaled, or in another dtype
    if any(weight.name in reading.names for weight in weights):
        return reading.opaque(call)
    name = str(call.op.overloadpacket).removeprefix("aten.")
    rule = _ELEMENTWISE.get(name.removesuffix("_") if call.op._schema.is_mutable else name, _any_of_all)
    return rule(reading, call)


def _any_of_all(reading: Reading, call: Call) -> Value:
    operands = [reading.units(arg) for arg in (*call.args, *call.kwargs.values()) if isinstance(arg, Ref)]
    constant = single(reading.flow.CONSTANT, ())
    return combine(reading.flow, "sum", [*operands, constant], call.outputs[0].shape)


def _sum(*positions: int) -> Callable[[Reading, Call], Value]:
    """Of the arguments at ``positions``; zero where all of them are."""

    def rule(reading: Reading, call: Call) -> Value:
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
    **dict.fromkeys(("where",), _sum(1, 2)),
    **dict.fromkeys(("masked_fill",), _sum(0, 2)),
    **dict.fromkeys(("mul", "multiply"), _product),
    **dict.fromkeys(("div", "divide", "true_divide"), _quotient),
    "pow": _power,
    "addcmul": _plus_product,
}


def reduction(reading: Reading, call: Call) -> Value | list[Value]:
    """Everything along some dimensions becomes one entry; a statistic where units were apart there."""
    value, shape = reading.units(call.args[0]), call.args[0].shape
    dims = _dims(call, len(shape))
    made = gather(reading.flow, value, dims, statistic=True)
    return [Units(made.node, reshaped(made.labels, ref.shape)) for ref in call.outputs]


def loss(reading: Reading, call: Call) -> Value:
    """All that was given makes one number."""
    return pooled(reading.flow, [reading.units(call.args[0])], ())


def _dims(call: Call, num_dims: int) -> list[int]:
    """Of ``dim=`` in any form; every dimension where it is left out."""
    names = [argument.name for argument in call.op._schema.arguments]
    at = names.index("dim") if "dim" in names else len(call.args)
    given = call.args[at] if at < len(call.args) else call.kwargs.get("dim")
    dims = range(num_dims) if given is None or given == [] else given if isinstance(given, list | tuple) else [given]
    return [dim % num_dims for dim in dims]


def along_dim(reading: Reading, call: Call) -> list[Value]:
    """Sorts, takes the largest, adds up along one dimension: its entries are no longer told apart."""
    value, shape = reading.units(call.args[0]), call.args[0].shape
    at = {"topk": 2, "kthvalue": 2}.get(str(call.op.overloadpacket).removeprefix("aten."), 1)
    dim = (call.args[at] if len(call.args) > at else call.kwargs.get("dim", -1)) % max(1, len(shape))
    if shape and varies(value.labels, dim):
        value = gather(reading.flow, value, (dim,))
    labels = value.labels.narrow(dim, 0, 1) if shape else value.labels
    first, rest = call.outputs[0], call.outputs[1:]
    if len(first.shape) != len(shape):
        labels = labels.squeeze(dim)
    return [Units(value.node, labels.expand(first.shape)), *(single(reading.flow.CONSTANT, ref.shape) for ref in rest)]
