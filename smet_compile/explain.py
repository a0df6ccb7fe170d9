"""explain: what the compiler passes made of each site, and where they did nothing, why."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smet_compile.format import arguments
from smet_compile.ops import Site, find_sites
from smet_compile.ops.sites import check_sparsified
from smet_compile.train_step import TrainStep

if TYPE_CHECKING:
    from smet_compile.passes.capture import Captured
    from smet_compile.passes.verify import Outcome

_NONE = "none"
_AFTER_BACKWARD = "by the optimizer, after backward"
_KEPT = "its gradient is an output of the graph, and kept until the optimizer's step"
_SEVERAL_GRAPHS = "the step breaks into several graphs, so gradients are kept until the optimizer's step"
_MANY_CAPTURES = 2**20


@dataclass(frozen=True)
class SiteExplanation:
    """One site: each part is "fused", "none" where there is no such part, or the reason why it is not fused.

    Args:
        forward: the product with the weight. input_gradient: the gradient of what it is multiplied with.
        weight_gradient: of the weight, compact where fused. update: by the optimizer, in backward.
        kernels: part → the kernel that computes it, where it is fused (``SMET_COMPILE_KERNEL`` forces one).
    """

    name: str
    forward: str
    input_gradient: str
    weight_gradient: str
    update: str
    kernels: dict[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, str]:
        names = ("forward", "input_gradient", "weight_gradient", "update")
        return {name.replace("_", " "): getattr(self, name) for name in names}


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found. ``print`` it for a table.

    Args:
        sites: one row for each site of the model.
        graph_breaks: why Dynamo broke the model into several graphs; each of them is optimised on its own.
        updates_fused: whether a step with fused updates was explained; else no update can be fused.
    """

    sites: list[SiteExplanation]
    graph_breaks: list[str]
    updates_fused: bool

    @property
    def not_fused(self) -> dict[str, list[str]]:
        """Site → what is not fused of it and why; sites of which all is fused are missing."""
        found = {}
        for site in self.sites:
            parts = {k: v for k, v in site.parts.items() if self.updates_fused or k != "update"}
            reasons = [f"{part}: {said}" for part, said in parts.items() if said not in ("fused", _NONE)]
            if reasons:
                found[site.name] = reasons
        return found

    def __str__(self) -> str:
        rows = [["site", "forward", "input gradient", "weight gradient", "update"]]
        for site in self.sites:
            rows.append([site.name, *(_cell(said, site.kernels.get(part)) for part, said in site.parts.items())])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"{name}: {reason}" for name, reasons in self.not_fused.items() for reason in reasons]
        if not self.updates_fused:
            lines.append("update: by the optimizer after backward; compile_train_step fuses it into backward")
        lines += [f"graph break: {reason}" for reason in self.graph_breaks]
        return "\n".join(lines)


def explain(model: nn.Module | TrainStep, *example: Any, strict: bool = False, **inputs: Any) -> Explanation:
    """Captures ``model`` afresh and says per site what is fused: forward, input gradient, weight gradient, update.

    Runs one forward, in the mode the model is in; random state and buffers are put back, nothing is trained. It
    generates no code and uses no compile cache: a warm cache runs no pass, so it could say nothing::

        print(smet.explain(model, **batch))
        print(smet.explain(step, batch))         # of compile_train_step: its updates too; or step, **batch

    Args:
        model: with compact weights, compiled or not; or what ``compile_train_step`` made.
        example, inputs: what it is called with. A step takes one batch: inputs by keyword are the dict of them.
        strict: raise where anything that could be fused is not.

    Raises:
        ValueError: a model without compact weights; with ``strict``, the list of what is not fused, with reasons.
    """
    step = model if isinstance(model, TrainStep) else None
    if step is None:
        arguments.module("explain", model)
    strict = arguments.flag("strict", strict)
    owner: Any = step.model if step else getattr(model, "_orig_mod", model)
    updates_fused = step is not None and step.fused
    check_sparsified("explain", owner)
    sites = find_sites(owner)
    if step:
        graphs, breaks = _capture_step(step, _one_batch(example, inputs))
    else:
        graphs, breaks = _capture(owner, lambda: owner(*example, **inputs))
    outcomes = _by_site(sites, graphs)
    unfused = _SEVERAL_GRAPHS if breaks else _KEPT if updates_fused else _AFTER_BACKWARD
    rows = [_explained(site, outcomes.get(name), unfused, bool(breaks)) for name, site in sites.items()]
    explanation = Explanation(rows, breaks, updates_fused)
    if strict and explanation.not_fused:
        lines = [f"{name}: {reason}" for name, reasons in explanation.not_fused.items() for reason in reasons]
        raise ValueError("explain: expected every site to be fused, got some that are not\n" + "\n".join(lines))
    return explanation


def _one_batch(example: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
    """A step takes one batch; given by keywords it is the dict of them."""
    if len(example) + bool(inputs) != 1:
        raise ValueError(
            f"explain: expected one batch as the step takes it, got {len(example)} by place and {len(inputs)} by "
            "keyword; call explain(step, batch), or explain(step, **batch) for a dict"
        )
    return example[0] if example else inputs


def _capture_step(step: TrainStep, batch: Any) -> tuple[list[Captured], list[str]]:
    updates = step.updates()
    with step.gradients_in_sinks(updates):
        captured = _capture(step.model, lambda: step.forward(batch, updates))
    step.forget_unused(updates)
    return captured


def _capture(owner: nn.Module, call: Callable[[], Any]) -> tuple[list[Captured], list[str]]:
    from smet_compile.passes.capture import Capture

    capture = Capture()
    # A code object of its own: Dynamo keeps what it compiled by code object, and would find it there again.
    code = call.__code__.replace()
    fresh = types.FunctionType(code, call.__globals__, "captured", None, call.__closure__)
    counters = torch._dynamo.utils.counters["graph_break"]
    before = dict(counters)
    with _undisturbed(owner), torch._dynamo.config.patch(recompile_limit=_MANY_CAPTURES):
        torch.compile(fresh, backend=capture)()
    breaks = [_first_line(reason) for reason, count in counters.items() if count > before.get(reason, 0)]
    return capture.graphs, breaks


def _first_line(reason: str) -> str:
    return reason.strip().splitlines()[0] if reason.strip() else "unknown"


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Random state and buffers (those of a BatchNorm, say) are afterwards what they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(), torch.compiler.set_stance("default"):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def _by_site(sites: dict[str, Site], graphs: list[Captured]) -> dict[str, Outcome]:
    """What became of each site in all graphs together."""
    from smet_compile.passes.verify import Outcome, outcomes

    names = {id(site.compact.topology): name for name, site in sites.items()}
    found: dict[str, Outcome] = {}
    for graph in graphs:
        for placeholder, outcome in outcomes(graph.joint.graph).items() if graph.joint is not None else ():
            whole = found.setdefault(names[id(graph.input_of(placeholder))], Outcome())
            for part, said in outcome.parts.items():
                for what in said:
                    whole.add(part, what)
            for part, kernels in outcome.kernels.items():
                for kernel in kernels:
                    whole.add(part, "fused", kernel)
    return found


def _explained(site: Site, outcome: Outcome | None, unfused: str, broken: bool) -> SiteExplanation:
    """``unfused``: why an update is not fused, if it is not. ``broken``: then none is."""
    if outcome is None:
        unused = "the example does not use it in any captured graph"
        return SiteExplanation(site.name, unused, _NONE, _NONE, _NONE)
    forward, input_gradient, weight_gradient = (
        _said(outcome, part) for part in ("forward", "input gradient", "weight gradient")
    )
    update = _said(outcome, "update")
    if weight_gradient != _NONE and (update == _NONE or broken):
        update = unfused
    kernels = {part: " and ".join(names) for part, names in outcome.kernels.items()}
    return SiteExplanation(site.name, forward, input_gradient, weight_gradient, update, kernels)


def _cell(said: str, kernel: str | None) -> str:
    """Of the table: the kernel where it is fused."""
    return kernel or said if said == "fused" else said if said == _NONE else "no"


def _said(outcome: Outcome, part: str) -> str:
    reasons = [what for what in outcome.parts.get(part, [_NONE]) if what != "fused"]
    return "; ".join(reasons) if reasons else "fused"
