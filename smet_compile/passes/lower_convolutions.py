"""Replaces 1x1 convolutions with a compact weight by matrix products over channels, which later passes fuse.

    convolution(x, w, bias, ...)               →  permute(view(addmm(bias, tokens(x), permute(view(w)))))
    convolution_backward(gy, x, w, ...)        →  permute(view(mm(tokens(gy), view(w)))),       to the input
                                                  view(mm(permute(tokens(gy)), tokens(x))),     to the weight
                                                  sum(tokens(gy)),                              to the bias

``tokens`` leaves out the positions that a stride skips, puts channels last and makes one dimension of all others.
Inputs in channels-last format are read where they lie, others are copied once. Results have the strides that those of
the convolution have. The gradient of a strided input is written into zeros.

Shape suffixes: X positions of all images, R rows (out), C cols (in).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from smet_compile.format import Layout
from smet_compile.passes.canonicalize import uses
from smet_compile.passes.graph import (
    ADDMM,
    MM,
    UNPACK,
    PassReport,
    SiteArgs,
    add,
    arguments,
    aten,
    calls,
    is_call,
    permuted,
    size,
    val,
)
from smet_compile.passes.weight_views import whole

CONVOLUTION, BACKWARD = aten.convolution.default, aten.convolution_backward.default
_ALL = 2**63 - 1
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def lower_convolutions(graph: fx.Graph) -> PassReport:
    """Rewrites every 1x1 convolution that reads an unpacked weight, forward and backward."""
    report = PassReport("lower_convolutions")
    for unpack in calls(graph, UNPACK):
        site = SiteArgs.of(unpack)
        start = whole(site.layout)
        if start is None or len(site.layout.shape) < 3:
            continue
        for weight, user, view in list(uses(unpack, start)):
            if not is_call(user, CONVOLUTION, BACKWARD) or arguments(user)["weight"] is not weight:
                continue
            reason = reason_to_keep(user, site.layout)
            if reason is not None or view.labels != start.labels:
                report.skipped.append((site.name, reason or "its weight is a permutation of the site's"))
                continue
            (_lower_forward if is_call(user, CONVOLUTION) else _lower_backward)(user, weight)
            report.matched += 1
    graph.eliminate_dead_code()
    return report


def reason_to_keep(node: fx.Node, layout: Layout) -> str | None:
    """Returns why a convolution with this weight stays one; None where it is a product over channels."""
    known, kernel = arguments(node), layout.shape[2:]
    if known["transposed"]:
        return "a transposed convolution"
    if known["groups"] != 1:
        return "a grouped convolution"
    if any(side != 1 for side in kernel):
        return f"a convolution of kernel {'x'.join(map(str, kernel))}"
    if any(known["padding"]):
        return "a 1x1 convolution with padding"
    if whole(layout) is None:
        return "a convolution with one channel"
    return None


def _lower_forward(node: fx.Node, weight: fx.Node) -> None:
    known = arguments(node)
    strided = _strided(node, known["input"], known["stride"])
    x_XC = _tokens(node, strided)
    weight_CR = permuted(node, _matrix(node, weight))
    bias = known["bias"]
    y_XR = add(node, MM, x_XC, weight_CR) if bias is None else add(node, ADDMM, bias, x_XC, weight_CR)
    node.replace_all_uses_with(_image(node, y_XR, strided, val(node)))
    node.graph.erase_node(node)


def _lower_backward(node: fx.Node, weight: fx.Node) -> None:
    known = arguments(node)
    results: dict[int, fx.Node] = {user.args[1]: user for user in node.users}  # type: ignore[misc]
    grad_XR = _tokens(node, known["grad_output"])
    if 0 in results:
        grad_XC = add(node, MM, grad_XR, _matrix(node, weight))
        x, like = known["input"], val(results[0])
        if all(step == 1 for step in known["stride"]):
            made = _image(node, grad_XC, known["grad_output"], like)
        else:
            spread = _spread(node, _image(node, grad_XC, known["grad_output"], None), x, known["stride"])
            made = _with_strides(node, spread, like)
        results[0].replace_all_uses_with(made)
    if 1 in results:
        x_XC = _tokens(node, _strided(node, known["input"], known["stride"]))
        grad_RC = add(node, MM, permuted(node, grad_XR), x_XC)
        results[1].replace_all_uses_with(add(node, aten.view.default, grad_RC, list(val(weight).shape)))
    if 2 in results:
        results[2].replace_all_uses_with(add(node, aten.sum.dim_IntList, grad_XR, [0]))
    for result in results.values():
        node.graph.erase_node(result)
    node.graph.erase_node(node)


def _matrix(like: fx.Node, weight: fx.Node) -> fx.Node:
    """Adds (R, C, 1, ...) → (R, C), for a weight or some of its rows."""
    return add(like, aten.view.default, weight, list(val(weight).shape[:2]))


def _strided(like: fx.Node, x: fx.Node, stride: list[int]) -> fx.Node:
    """Adds slices that keep the positions which a convolution of this stride reads."""
    for dim, step in enumerate(stride, start=2):
        if step != 1:
            x = add(like, aten.slice.Tensor, x, dim, 0, _ALL, step)
    return x


def _tokens(like: fx.Node, x: fx.Node) -> fx.Node:
    """Adds (N, C, ...) → (X, C)."""
    last = add(like, aten.permute.default, x, [0, *range(2, val(x).dim()), 1])
    if not val(last).is_contiguous():
        last = add(like, aten.clone.default, last, memory_format=torch.contiguous_format)
    return add(like, aten.view.default, last, [-1, val(x).shape[1]])


def _image(like: fx.Node, tokens: fx.Node, positions: fx.Node, strides_of: Any) -> fx.Node:
    """Adds (X, C) → (N, C, ...) with the positions of a node, contiguous where ``strides_of`` is."""
    num_dims = val(positions).dim()
    sizes = [size(like, positions, dim) for dim in (0, *range(2, num_dims))]
    last = add(like, aten.view.default, tokens, [*sizes, val(tokens).shape[1]])
    image = add(like, aten.permute.default, last, [0, num_dims - 1, *range(1, num_dims - 1)])
    return image if strides_of is None else _with_strides(like, image, strides_of)


def _with_strides(like: fx.Node, node: fx.Node, wanted: Any) -> fx.Node:
    """Adds a copy in the memory format of ``wanted`` where the strides differ."""
    if val(node).stride() == wanted.stride():
        return node
    last = _CHANNELS_LAST.get(wanted.dim())
    is_last = last is not None and not wanted.is_contiguous() and wanted.is_contiguous(memory_format=last)
    return add(like, aten.clone.default, node, memory_format=last if is_last else torch.contiguous_format)


def _spread(like: fx.Node, image: fx.Node, x: fx.Node, stride: list[int]) -> fx.Node:
    """Adds zeros of the shape of ``x`` with ``image`` written to the positions that a stride keeps."""
    sizes, fake = [size(like, x, dim) for dim in range(val(x).dim())], val(x)
    levels = [add(like, aten.full.default, sizes, 0, dtype=fake.dtype, device=fake.device)]
    steps = [(dim, step) for dim, step in enumerate(stride, start=2) if step != 1]
    for dim, step in steps[:-1]:
        levels.append(add(like, aten.slice.Tensor, levels[-1], dim, 0, _ALL, step))
    for (dim, step), level in zip(reversed(steps), reversed(levels), strict=True):
        image = add(like, aten.slice_scatter.default, level, image, dim, 0, _ALL, step)
    return image
