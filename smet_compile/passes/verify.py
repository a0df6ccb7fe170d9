"""Finds out what became of each site, and why something was not fused. The graph is not changed.

An ``unpack`` or ``pack`` that is left was not fused; the node that reads it, or that it reads, tells the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from smet_compile.format import Layout
from smet_compile.ops.choose import Case, kernel_of
from smet_compile.ops.updates import Settings
from smet_compile.passes.canonicalize import uses
from smet_compile.passes.fuse_update import SAMPLED_UPDATE, TORCH_OPTIM, updated_sites
from smet_compile.passes.fuse_update import kernel_of as update_kernel_of
from smet_compile.passes.graph import (
    MASKED,
    PACK,
    PRODUCTS,
    SAMPLED,
    UNPACK,
    PassReport,
    SiteArgs,
    arguments,
    aten,
    calls,
    is_call,
    updated,
    val,
)
from smet_compile.passes.lower_convolutions import reason_to_keep
from smet_compile.passes.weight_views import View

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, UPDATE = "forward", "input gradient", "weight gradient", "update"
PARTS = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, UPDATE)
FUSED = "fused"

_LOOKUPS: tuple[Any, ...] = (aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default)
_LOOKUPS += (aten.select.int, aten.unbind.int, aten.embedding_dense_backward.default)


@dataclass
class Outcome:
    """Holds for one site part → "fused", or the reasons why it is not. Parts that the graph does not have are missing.

    ``kernels``: part → the names of the kernels that compute what is fused.
    """

    parts: dict[str, list[str]] = field(default_factory=dict)
    kernels: dict[str, list[str]] = field(default_factory=dict)

    def add(self, part: str, result: str, kernel: str | None = None) -> None:
        """Adds a result, "fused" or a reason, to a part."""
        for found, new in ((self.parts, result), (self.kernels, kernel)):
            if new is not None and new not in found.setdefault(part, []):
                found[part].append(new)

    @property
    def reasons(self) -> list[str]:
        return [f"{part}: {result}" for part, results in self.parts.items() for result in results if result != FUSED]


def verify(graph: fx.Graph) -> PassReport:
    """Counts the sites that are wholly fused, and reports the reasons for the others."""
    report = PassReport("verify")
    for name, outcome in outcomes(graph).items():
        report.matched += not outcome.reasons
        report.skipped += [(name, reason) for reason in outcome.reasons]
    return report


def outcomes(graph: fx.Graph) -> dict[str, Outcome]:
    """Returns the outcome for each site, by the name of the node that holds its topology."""
    backward = _backward(graph)
    found: dict[str, Outcome] = {}

    def outcome_of(node: fx.Node) -> Outcome:
        return found.setdefault(SiteArgs.of(node).name, Outcome())

    for node in calls(graph, MASKED):
        part, known = INPUT_GRADIENT if node in backward else FORWARD, arguments(node)
        num_active = val(known["values"]).shape[0]
        outcome_of(node).add(part, FUSED, _kernel("masked_matmul", known["values"], num_active, known))
    for node in calls(graph, UNPACK):
        for user, reason in _reasons(node):
            outcome_of(node).add(INPUT_GRADIENT if user in backward else FORWARD, reason)
    for node in calls(graph, SAMPLED):
        known = arguments(node)
        kernel = _kernel("sampled_matmul", known["left"], known["num_active"], known)
        outcome_of(node).add(WEIGHT_GRADIENT, FUSED, kernel)
    for node in calls(graph, PACK):
        outcome_of(node).add(WEIGHT_GRADIENT, _gradient_reason(node))
    for name, update in updated_sites(graph):
        outcome = found.setdefault(name, Outcome())
        outcome.add(UPDATE, FUSED, "torch" if update.args[0] is TORCH_OPTIM else update_kernel_of(update))
        if update.args[0] is SAMPLED_UPDATE:
            known = updated(update)
            num_active = val(known["values"]).shape[0]
            known["layout"] = Settings.from_text(known["settings"]).layout
            outcome.add(WEIGHT_GRADIENT, FUSED, _kernel("sampled_matmul", known["left"], num_active, known))
    return found


def _kernel(op: str, node: fx.Node, num_active: Any, known: dict[str, Any]) -> str | None:
    """Returns the kernel that computes ``op`` on the tensor of ``node``; None where sizes are symbols."""
    if type(num_active) is not int:
        return None
    tensor, layout = val(node), Layout.from_text(known["layout"])
    return kernel_of(op, Case(tensor.device, tensor.dtype, layout, num_active, known["offsets"] is not None))


def _backward(graph: fx.Graph) -> set[fx.Node]:
    """Returns every node that depends on the gradient of an output."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and node.name.startswith("tangents")
        if is_tangent or (node.op != "output" and any(source in found for source in node.all_input_nodes)):
            found.add(node)
    return found


def _reasons(unpack: fx.Node) -> Iterator[tuple[fx.Node, str]]:
    """Yields each reader of a dense weight, through any views, and why it is not fused."""
    whole = View(tuple("?" * val(unpack).dim()))
    for _, user, _ in uses(unpack, whole):
        yield user, _reason(user, SiteArgs.of(unpack).layout)


def _reason(user: fx.Node, layout: Layout) -> str:
    name = _name(user)
    if user.op == "output":
        return "the dense weight is returned or crosses a graph break"
    if "convolution" in name:
        return f"read by {reason_to_keep(user, layout) or 'a convolution'}"
    if is_call(user, *_LOOKUPS):
        return f"rows or matrices of it are looked up ({name}), as an embedding or data-dependent experts do"
    if is_call(user, MASKED, SAMPLED):
        return "multiplied with another compact weight, which is fused in its place"
    if is_call(user, *PRODUCTS):
        return f"multiplied by {name} in a form that is not known, or added to what it multiplies"
    return f"read by {name}, which is not a matrix product"


def _gradient_reason(pack: fx.Node) -> str:
    source = pack.args[0]
    if is_call(source, UNPACK):
        return "its gradient is that of another packed weight"
    if len(source.users) > 1:
        return "the dense gradient is read by others too (growth by gradient reads it in the step before an update)"
    return f"the gradient comes from {_name(source)}, which is not a matrix product"


def _name(node: Any) -> str:
    """Returns the name of a node's op; for one of several results, that of the op which has them."""
    if getattr(node.target, "__name__", "") == "getitem":
        return _name(node.args[0])
    return str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target))
