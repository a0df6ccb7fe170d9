"""Explains what the compiler passes made of each site, and where they did nothing, why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from smet_compile.format import arguments
from smet_compile.notebook import frame_of, html_lines, html_table, html_view
from smet_compile.ops import Site, find_sites
from smet_compile.ops.sites import check_sparsified
from smet_compile.shards import reshard
from smet_compile.tables import table_lines
from smet_compile.tracing import Captured, capture_graphs, leave_no_trace
from smet_compile.train_step import TrainStep

if TYPE_CHECKING:
    from smet_compile.passes.verify import Outcome

_FUSED, _NONE = "fused", "none"
_HEADINGS = ("site", "forward", "input gradient", "weight gradient", "update")
_OF_A_MODEL = "by the optimizer after backward; compile_train_step fuses it into backward"
_AFTER_BACKWARD = "by the optimizer, after backward: {}"
_KEPT = "its gradient is an output of the graph, and kept until the optimizer's step"
_USED_OTHERWISE = (
    "the loss uses the parameter itself too (a penalty on model.parameters(), functional_call with what is computed "
    "from it), so its gradient is kept until the optimizer's step"
)
_SEVERAL_GRAPHS = "the step breaks into several graphs, so gradients are kept until the optimizer's step"


@dataclass(frozen=True)
class SiteExplanation:
    """Explains one site. A part is "fused", "none" where it does not exist, or the reason why it is not fused.

    Args:
        name: the name of the weight.
        forward: the product with the weight.
        input_gradient: the gradient of the product's other factor.
        weight_gradient: the gradient of the weight, compact where fused.
        update: the optimizer's update in backward.
        kernels: part → the kernel that computes it, where it is fused (``SMET_COMPILE_KERNEL`` forces one).
        correction: what ``correct_gradients`` decided for it; None where it was not called.
    """

    name: str
    forward: str
    input_gradient: str
    weight_gradient: str
    update: str
    kernels: dict[str, str] = field(default_factory=dict)
    correction: str | None = None

    @property
    def parts(self) -> dict[str, str]:
        names = ("forward", "input_gradient", "weight_gradient", "update")
        return {name.replace("_", " "): getattr(self, name) for name in names}

    def cells(self) -> tuple[str, ...]:
        """Returns a row of the table: the kernel of each part, "fused" where it is not known, "none" or "no"."""
        return self.name, *(_cell(result, self.kernels.get(part)) for part, result in self.parts.items())


@dataclass(frozen=True)
class Explanation:
    """Holds what ``explain`` found. ``print`` it for a table.

    Args:
        sites: one row for each site of the model.
        graph_breaks: why Dynamo broke the model into several graphs; each of them is optimised on its own.
        updates_fused: whether a step with fused updates was explained; if not, no update can be fused.
    """

    sites: list[SiteExplanation]
    graph_breaks: list[str]
    updates_fused: bool

    @property
    def not_fused(self) -> dict[str, list[str]]:
        """Maps each site that is not wholly fused to the parts that are not, with reasons."""
        found = {}
        for site in self.sites:
            parts = {k: v for k, v in site.parts.items() if self.updates_fused or k != "update"}
            reasons = [f"{part}: {result}" for part, result in parts.items() if result not in (_FUSED, _NONE)]
            if reasons:
                found[site.name] = reasons
        return found

    def to_pandas(self) -> Any:
        """Returns a ``DataFrame`` with a row for each site; a list of dicts where pandas is not installed.

        Each part has two columns: the result, and the kernel that computes it (``forward``, ``forward_kernel``).
        """
        return frame_of([_record(site) for site in self.sites])

    def _notes(self) -> list[str]:
        lines = [f"{name}: {reason}" for name, reasons in self.not_fused.items() for reason in reasons]
        lines += [f"{site.name}: gradient {site.correction}" for site in self.sites if site.correction is not None]
        if not self.updates_fused:
            reasons = dict.fromkeys(site.update for site in self.sites if site.update not in (_FUSED, _NONE))
            lines += [f"update: {reason}" for reason in reasons or (_OF_A_MODEL,)]
        return lines + [f"graph break: {reason}" for reason in self.graph_breaks]

    def __str__(self) -> str:
        rows = [_HEADINGS, *(site.cells() for site in self.sites)]
        return "\n".join([*table_lines(rows, left=range(5)), *self._notes()])

    def _repr_html_(self) -> str:
        rows = [site.cells() for site in self.sites]
        whole = len(self.sites) - len(self.not_fused)
        title = f"{whole} of {len(self.sites)} sites are wholly fused"
        return html_view(title, html_table(_HEADINGS, rows, left=range(5)), html_lines(self._notes()))


def _record(site: SiteExplanation) -> dict[str, Any]:
    found: dict[str, Any] = {"name": site.name}
    for part, result in site.parts.items():
        column = part.replace(" ", "_")
        found |= {column: result, f"{column}_kernel": site.kernels.get(part)}
    return found | {"correction": site.correction}


def explain(model: nn.Module | TrainStep, *example: Any, strict: bool = False, **inputs: Any) -> Explanation:
    """Captures ``model`` afresh and explains per site what is fused: forward, both gradients, update.

    Runs one forward, in the mode the model is in, and restores random state, buffers and attributes; nothing is
    trained. It generates no code and uses no compile cache, since with a warm cache no pass would run::

        print(smet.explain(model, **batch))
        print(smet.explain(step, batch))         # a step of compile_train_step: its updates too; or step, **batch

    Args:
        model: a model with compact weights, compiled or not; or a step that ``compile_train_step`` made.
        example: the arguments of the call. A step takes one batch.
        inputs: the keyword arguments of the call, which are put into one dict for a step.
        strict: whether to raise where anything that could be fused is not.

    Raises:
        ValueError: a model without compact weights, or one that ``fully_shard`` has cut; with ``strict``, the list of
            what is not fused, with reasons.
    """
    step = model if isinstance(model, TrainStep) else None
    if step is None:
        arguments.module("explain", model)
    strict = arguments.flag("strict", strict)
    owner: Any = step.model if step else getattr(model, "_orig_mod", model)
    updates_fused = step is not None and step.fused
    check_sparsified("explain", owner)
    if reshard(owner):
        raise ValueError(
            "explain: expected a model that is whole, got one that fully_shard has cut; explain it before fully_shard, "
            "which changes nothing in what is fused within a module"
        )
    sites = find_sites(owner)
    used_otherwise: set[int] = set()
    if step:
        graphs, breaks, used_otherwise = _capture_step(step, _one_batch(example, inputs))
    else:
        with leave_no_trace(owner):
            graphs, breaks = capture_graphs(lambda: owner(*example, **inputs))
    outcomes = _by_site(sites, graphs)
    rows = []
    for name, site in sites.items():
        unfused = _USED_OTHERWISE if id(site.values) in used_otherwise else _why_not_fused(step, site, bool(breaks))
        rows.append(_explain_site(site, outcomes.get(name), unfused, bool(breaks)))
    explanation = Explanation(rows, breaks, updates_fused)
    if strict and explanation.not_fused:
        lines = [f"{name}: {reason}" for name, reasons in explanation.not_fused.items() for reason in reasons]
        raise ValueError("explain: expected every site to be fused, got some that are not\n" + "\n".join(lines))
    return explanation


def _one_batch(example: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
    """Returns the one batch that a step takes; keywords are one dict."""
    if len(example) + bool(inputs) != 1:
        raise ValueError(
            f"explain: expected one batch as the step takes it, got {len(example)} by place and {len(inputs)} by "
            "keyword; call explain(step, batch), or explain(step, **batch) for a dict"
        )
    return example[0] if example else inputs


def _capture_step(step: TrainStep, batch: Any) -> tuple[list[Captured], list[str], set[int]]:
    """Returns the graphs, the graph breaks, and the ids of parameters whose update was asked for and is in no graph."""
    from smet_compile.passes.fuse_update import updated_tensors

    updates = step.updates()
    with step.gradients_in_sinks(updates) as sinks, leave_no_trace(step.model):
        graphs, breaks = capture_graphs(lambda: step.forward(batch, sinks))
    step.forget_unused(updates)
    updated = {
        id(graph.input_of(name))
        for graph in graphs
        if graph.joint is not None
        for name in updated_tensors(graph.joint.graph)
    }
    parameters = {id(values): id(parameter) for _, _, (parameter, values, *_) in sinks}
    others = {parameter for values, parameter in parameters.items() if values not in updated}
    return graphs, breaks, set() if breaks else others


def _by_site(sites: dict[str, Site], graphs: list[Captured]) -> dict[str, Outcome]:
    """Returns the outcome of each site in all graphs together."""
    from smet_compile.passes.verify import Outcome, outcomes

    names = {id(site.compact.topology): name for name, site in sites.items()}
    found: dict[str, Outcome] = {}
    for graph in graphs:
        for placeholder, outcome in outcomes(graph.joint.graph).items() if graph.joint is not None else ():
            name = names.get(id(graph.input_of(placeholder)))
            if name is None:  # a sparse module that is no part of the model, as a loss may run one
                continue
            whole = found.setdefault(name, Outcome())
            for part, results in outcome.parts.items():
                for result in results:
                    whole.add(part, result)
            for part, kernels in outcome.kernels.items():
                for kernel in kernels:
                    whole.add(part, _FUSED, kernel)
    return found


def _why_not_fused(step: TrainStep | None, site: Site, has_breaks: bool) -> str:
    """Says why the update of a site is not fused, if it is not."""
    if step is None:
        return _OF_A_MODEL
    kept = step.why_kept(site)
    if kept is not None:
        return _AFTER_BACKWARD.format(kept)
    return _SEVERAL_GRAPHS if has_breaks else _KEPT


def _explain_site(site: Site, outcome: Outcome | None, unfused_update: str, has_breaks: bool) -> SiteExplanation:
    """Explains one site.

    Args:
        outcome: None where no graph uses the site. unfused_update: why its update is not fused, if it is not.
        has_breaks: whether the model breaks into several graphs; then no update is fused.
    """
    correction = site.compact.correction
    if outcome is None:
        unused = "the example does not use it in any captured graph"
        return SiteExplanation(site.name, unused, _NONE, _NONE, _NONE, correction=correction)
    parts = ("forward", "input gradient", "weight gradient", "update")
    forward, input_gradient, weight_gradient, update = (_result(outcome, part) for part in parts)
    if weight_gradient != _NONE and (update == _NONE or has_breaks):
        update = unfused_update
    kernels = {part: " and ".join(names) for part, names in outcome.kernels.items()}
    return SiteExplanation(site.name, forward, input_gradient, weight_gradient, update, kernels, correction)


def _cell(result: str, kernel: str | None) -> str:
    """Returns a cell of the table: the kernel, "fused" where it is not known, "none" or "no"."""
    return kernel or result if result == _FUSED else result if result == _NONE else "no"


def _result(outcome: Outcome, part: str) -> str:
    reasons = [result for result in outcome.parts.get(part, [_NONE]) if result != _FUSED]
    return "; ".join(reasons) if reasons else _FUSED
