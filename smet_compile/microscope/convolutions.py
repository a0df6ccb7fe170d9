"""Rules for ops over space: convolutions and pooling, of channels."""

from __future__ import annotations

from smet_compile.microscope.combine import combine, gather
from smet_compile.microscope.products import meets
from smet_compile.microscope.reading import Reading, short_name
from smet_compile.microscope.recorder import Call
from smet_compile.microscope.units import Units, Value, Weight, single, varies

OVER_SPACE = (
    "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_trilinear3d",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
    "replication_pad3d",
)  # fmt: skip


def over_space(reading: Reading, call: Call) -> list[Value]:
    """Neighbours become one, one becomes neighbours: channels stay apart."""
    value, num_dims = reading.units(call.args[0]), len(call.args[0].shape)
    num_space = next(int(letter) for letter in short_name(call) if letter.isdigit())
    channels = _channels(reading, value, range(num_dims - num_space, num_dims))
    rest = [single(reading.flow.CONSTANT, ref.shape) for ref in call.outputs[1:]]
    return [Units(channels.node, channels.labels.expand(call.outputs[0].shape)), *rest]


def _channels(reading: Reading, value: Units, space: range) -> Units:
    """All places as one: size 1 along ``space``."""
    channels = gather(reading.flow, value, space)
    labels = channels.labels
    for dim in space:
        labels = labels.narrow(dim, 0, 1)
    return Units(channels.node, labels)


def convolution(reading: Reading, call: Call) -> Value:
    """(B, I, ...) to (B, O, ...) with a weight (O, I, ...): a channel meets all columns of its kernel."""
    value, weight = reading.units(call.args[0]), reading.value(call.args[1])
    transposed, groups = call.args[6], call.args[8]
    if not reading.is_site(weight) and groups == call.args[1].shape[0] == call.args[0].shape[1] > 1:
        return _depthwise(reading, call, value)
    if not isinstance(weight, Weight) or transposed or groups != 1 or varies(weight.cols, 0) or varies(weight.rows, 1):
        return reading.opaque(call)
    batch_and_space = (0, *range(2, value.labels.dim()))
    channels = gather(reading.flow, value, batch_and_space)
    channels = Units(channels.node, channels.labels.flatten(2))
    link = meets(reading, channels, weight.cols[:1].flatten(2), weight.num_cols)
    rows = reading.flow.matrix(weight.name, link, weight.num_cols, weight.num_rows)
    at_channel = weight.rows.flatten(1)[:, 0].view(-1, *[1] * (value.labels.dim() - 2))
    return _biased(reading, call, Units(rows, at_channel.expand(call.outputs[0].shape)))


def _depthwise(reading: Reading, call: Call, value: Units) -> Value:
    """Each channel by itself."""
    channels = _channels(reading, value, range(2, value.labels.dim()))
    return _biased(reading, call, Units(channels.node, channels.labels.expand(call.outputs[0].shape)))


def _biased(reading: Reading, call: Call, out: Units) -> Units:
    bias = single(reading.flow.CONSTANT if call.args[2] else reading.flow.ZERO, ())
    return combine(reading.flow, "sum", [out, bias], tuple(out.labels.shape))
