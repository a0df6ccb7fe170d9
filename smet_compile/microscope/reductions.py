"""Rules for ops that take in everything along some dimensions: sums, means, norms, sorts, losses."""

from __future__ import annotations

from smet_compile.microscope.combine import gather, pooled
from smet_compile.microscope.reading import Reading, short_name
from smet_compile.microscope.recorder import Call
from smet_compile.microscope.units import Units, Value, reshaped, single, varies

REDUCTIONS = (
    "sum", "mean", "amax", "amin", "var", "std", "var_mean", "linalg_vector_norm", "norm", "logsumexp", "prod",
    "argmax", "argmin", "nansum", "any", "all", "count_nonzero",
)  # fmt: skip
ALONG_DIM = ("topk", "sort", "cumsum", "max", "min", "kthvalue", "logcumsumexp")


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
    at = {"topk": 2, "kthvalue": 2}.get(short_name(call), 1)
    dim = (call.args[at] if len(call.args) > at else call.kwargs.get("dim", -1)) % max(1, len(shape))
    if shape and varies(value.labels, dim):
        value = gather(reading.flow, value, (dim,))
    labels = value.labels.narrow(dim, 0, 1) if shape else value.labels
    first, rest = call.outputs[0], call.outputs[1:]
    if len(first.shape) != len(shape):
        labels = labels.squeeze(dim)
    return [Units(value.node, labels.expand(first.shape)), *(single(reading.flow.CONSTANT, ref.shape) for ref in rest)]
