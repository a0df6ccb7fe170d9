"""Reads elementwise ops, norms, softmax and dropout, which keep every unit where it is; and reductions."""

from __future__ import annotations

from collections.abc import Callable

from smet_compile.microscope.flow import Units, Value, Weight, follow_choice, gather, pool, reshape_labels, varies
from smet_compile.microscope.reading import Reading, Rule, named_arguments, short_name
from smet_compile.microscope.recording import Call, Ref

KEEP_ZERO = (
    "abs", "alias", "asinh", "atan", "celu", "clone", "contiguous", "detach", "dropout", "elu", "erf", "expm1",
    "gelu", "hardswish", "leaky_relu", "lift_fresh", "lift_fresh_copy", "log1p", "mish",
    "native_dropout", "neg", "relu", "relu6", "round", "rms_norm", "_fused_rms_norm", "selu", "sgn", "sign",
    "silu", "sin", "sinh", "sqrt", "square", "tan", "tanh", "_to_copy", "trunc",
)  # fmt: skip
"""Names the ops f with f(0) = 0."""
SHIFT = (
    "softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "native_layer_norm",
    "native_group_norm", "native_batch_norm", "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "_batch_norm_no_update",
    "cudnn_batch_norm", "miopen_batch_norm",
)  # fmt: skip
"""Names ops whose units depend on the others too, by a mean and a scale: no path is followed through those."""
REDUCTIONS = (
    "sum", "mean", "amax", "amin", "var", "std", "var_mean", "linalg_vector_norm", "norm", "logsumexp", "prod",
    "argmax", "argmin", "nansum", "any", "all", "count_nonzero",
)  # fmt: skip
ALONG_DIM = ("topk", "sort", "cumsum", "max", "min", "kthvalue", "logcumsumexp")
BOUNDS = ("min", "min_val"), ("max", "max_val")
CLAMPS = ("clamp", "clamp_min", "clamp_max", "hardtanh")
PRODUCTS = ("mul", "multiply")
QUOTIENTS = ("div", "divide", "true_divide")


def _keep(reading: Reading, call: Call) -> list[Value]:
    """Returns the first argument, perhaps in another dtype, and for other results constants: masks and statistics."""
    return [reading.value(call.args[0]), *reading.constants(call.outputs[1:])]


def _shift(reading: Reading, call: Call) -> list[Value]:
    """Does as ``_keep``, but zero does not stay zero."""
    if reading.is_site(reading.value(call.args[0])):
        return [reading.opaque(call)] * len(call.outputs)
    shifted = reading.sum([reading.units(call.args[0]), reading.constant()], call.outputs[0].shape)
    return [shifted, *reading.constants(call.outputs[1:])]


def _pointwise(reading: Reading, call: Call) -> Value | list[Value]:
    """Reads any elementwise op: its results have units where an operand has them."""
    operands = [reading.value(arg) for arg in (*call.args, *call.kwargs.values()) if isinstance(arg, Ref)]
    weight = _scaled_weight(reading, call, operands)
    if weight is not None:
        return weight
    if any(reading.is_site(value) for value in operands):
        return reading.opaque(call)
    return _ELEMENTWISE.get(short_name(call), _any_of_all)(reading, call)


def _scaled_weight(reading: Reading, call: Call, operands: list[Value]) -> Weight | None:
    """Returns the one matrix among the operands, scaled or in another dtype; a site only where zero stays zero."""
    weights = [value for value in operands if isinstance(value, Weight)]
    others = [value for value in operands if isinstance(value, Units)]
    if len(weights) != 1 or tuple(weights[0].rows.shape) != call.outputs[0].shape or weights[0].chosen:
        return None
    name = short_name(call)
    keeps_zero = name in (*KEEP_ZERO, *PRODUCTS) or (name in QUOTIENTS and operands[0] is weights[0])
    is_known = keeps_zero or not reading.is_site(weights[0])
    return weights[0] if is_known and all(value.node == reading.flow.constant for value in others) else None


def _any_of_all(reading: Reading, call: Call) -> Value:
    """Returns units that depend on those of all operands and are not zero where they are."""
    operands = [reading.units(arg) for arg in (*call.args, *call.kwargs.values()) if isinstance(arg, Ref)]
    return reading.sum([*operands, reading.constant()], call.outputs[0].shape)


def _sum_of(*positions: int) -> Callable[[Reading, Call], Units]:
    """Makes the rule of ops whose result is zero where all arguments at ``positions`` are."""

    def rule(reading: Reading, call: Call) -> Units:
        return reading.sum([reading.units(call.args[i]) for i in positions], call.outputs[0].shape)

    return rule


def _product(reading: Reading, call: Call) -> Value:
    return reading.product([reading.units(arg) for arg in call.args[:2]], call.outputs[0].shape)


def _quotient(reading: Reading, call: Call) -> Value:
    """Returns zero where the dividend is zero; the divisor never is."""
    dividend, divisor = (reading.units(arg) for arg in call.args[:2])
    nonzero = reading.sum([divisor, reading.constant()], tuple(divisor.labels.shape))
    return reading.product([dividend, nonzero], call.outputs[0].shape)


def _where(reading: Reading, call: Call) -> Value:
    """Returns one or the other. Where both are constant, the result depends on the choice."""
    return follow_choice(reading.flow, _sum_of(1, 2)(reading, call), reading.units(call.args[0]))


def _masked_fill(reading: Reading, call: Call) -> Value:
    return follow_choice(reading.flow, _sum_of(0, 2)(reading, call), reading.units(call.args[1]))


def _clamp(reading: Reading, call: Call) -> Value | list[Value]:
    """Keeps zero where it lies between the bounds."""
    bounds = named_arguments(call)
    low, high = (next((bounds[name] for name in pair if bounds.get(name) is not None), 0) for pair in BOUNDS)
    keeps_zero = isinstance(low, int | float) and isinstance(high, int | float) and low <= 0 <= high
    return _keep(reading, call) if keeps_zero else _any_of_all(reading, call)


def _power(reading: Reading, call: Call) -> Value | list[Value]:
    keeps_zero = isinstance(call.args[1], int | float) and call.args[1] > 0
    return _keep(reading, call) if keeps_zero else _any_of_all(reading, call)


def _plus_product(reading: Reading, call: Call) -> Value:
    shape = call.outputs[0].shape
    start, *factors = (reading.units(arg) for arg in call.args[:3])
    return reading.sum([start, reading.product(factors, shape)], shape)


_ELEMENTWISE: dict[str, Rule] = {
    **dict.fromkeys(KEEP_ZERO, _keep),
    **dict.fromkeys(("add", "sub", "rsub", "maximum", "minimum", "fmax", "fmin"), _sum_of(0, 1)),
    **dict.fromkeys(CLAMPS, _clamp),
    "where": _where,
    "masked_fill": _masked_fill,
    **dict.fromkeys(PRODUCTS, _product),
    **dict.fromkeys(QUOTIENTS, _quotient),
    "pow": _power,
    "addcmul": _plus_product,
}


def _reduction(reading: Reading, call: Call) -> Value | list[Value]:
    """Makes everything along some dimensions one entry; a statistic where units were apart there."""
    dims = _reduced_dims(call, len(call.args[0].shape))
    reduced = gather(reading.flow, reading.units(call.args[0]), dims, statistic=True)
    return [Units(reduced.node, reshape_labels(reduced.labels, ref.shape)) for ref in call.outputs]


def _reduced_dims(call: Call, num_dims: int) -> list[int]:
    """Reads ``dim=`` in any form; every dimension where it is left out."""
    given = named_arguments(call).get("dim")
    dims = range(num_dims) if given is None or given == [] else given if isinstance(given, list | tuple) else [given]
    return [dim % num_dims for dim in dims]


def _loss(reading: Reading, call: Call) -> Value:
    """Makes one number of all that was given."""
    return pool(reading.flow, [reading.units(call.args[0])], ())


def _along_dim(reading: Reading, call: Call) -> list[Value]:
    """Sorts, takes the largest or adds up along one dimension, whose entries are then no longer told apart."""
    value, shape = reading.units(call.args[0]), call.args[0].shape
    position = {"topk": 2, "kthvalue": 2}.get(short_name(call), 1)
    dim = (call.args[position] if len(call.args) > position else call.kwargs.get("dim", -1)) % max(1, len(shape))
    if shape and varies(value.labels, dim):
        value = gather(reading.flow, value, (dim,))
    labels = value.labels.narrow(dim, 0, 1) if shape else value.labels
    first = call.outputs[0]
    if len(first.shape) != len(shape):
        labels = labels.squeeze(dim)
    return [Units(value.node, labels.expand(first.shape)), *reading.constants(call.outputs[1:])]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("pointwise", "where", "masked_fill", *CLAMPS, *KEEP_ZERO), _pointwise),
    **dict.fromkeys(("native_dropout", "rms_norm", "_fused_rms_norm", "_prelu_kernel"), _keep),
    **dict.fromkeys(SHIFT, _shift),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(ALONG_DIM, _along_dim),
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), _loss),
}
