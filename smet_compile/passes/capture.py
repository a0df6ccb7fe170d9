"""Compiles without generating code: AOTAutograd, the passes, the partitioner. For ``explain`` and for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from functorch.compile import aot_module_simplified, make_boxed_func, min_cut_rematerialization_partition
from torch import fx
from torch._inductor.decomposition import select_decomp_table

from smet_compile.passes.graph import PassReport
from smet_compile.passes.pipeline import PASSES, Pass, run_passes


@dataclass
class Captured:
    """One graph that Dynamo captured.

    Args:
        sources: what each input of the graph is in Python, as Dynamo names it. inputs: the inputs themselves.
        joint: the forward and backward graph after the passes. forward, backward: its two halves; the backward
            is None without training. reports: of the passes.
    """

    sources: list[str]
    inputs: list[Any] = field(default_factory=list)
    joint: fx.GraphModule | None = None
    forward: fx.GraphModule | None = None
    backward: fx.GraphModule | None = None
    reports: list[PassReport] = field(default_factory=list)

    def input_of(self, name: str) -> Any:
        """The input that the placeholder ``name`` of ``joint`` stands for."""
        assert self.joint is not None
        placeholders = [node.name for node in self.joint.graph.find_nodes(op="placeholder")]
        return self.inputs[placeholders.index(name)]


class Capture:
    """A backend for ``torch.compile`` that keeps what it is given in ``graphs``.

    Args:
        passes: which to run, in order.
    """

    def __init__(self, passes: tuple[Pass, ...] = PASSES) -> None:
        self.passes = passes
        self.graphs: list[Captured] = []

    def __call__(self, dynamo: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        placeholders = dynamo.graph.find_nodes(op="placeholder")
        captured = Captured([_source(node) for node in placeholders], [_example(node) for node in placeholders])
        self.graphs.append(captured)

        def partition(
            joint: fx.GraphModule, joint_inputs: Any, **options: Any
        ) -> tuple[fx.GraphModule, fx.GraphModule]:
            captured.reports = run_passes(joint.graph, self.passes)
            joint.recompile()
            captured.joint = _copy(joint)
            halves: tuple[fx.GraphModule, fx.GraphModule] = min_cut_rematerialization_partition(
                joint, joint_inputs, compiler="inductor", **options
            )
            captured.forward, captured.backward = halves
            return halves

        def infer(graph: fx.GraphModule, example: Any) -> Any:
            captured.reports = run_passes(graph.graph, self.passes)
            graph.recompile()
            captured.joint = captured.forward = graph
            return make_boxed_func(graph.forward)

        def keep(graph: fx.GraphModule, example: Any) -> Any:
            return make_boxed_func(graph.forward)

        compiled: Callable[..., Any] = aot_module_simplified(
            dynamo,
            inputs,
            fw_compiler=keep,
            bw_compiler=keep,
            inference_compiler=infer,
            partition_fn=partition,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )
        return compiled


def _example(node: fx.Node) -> Any:
    """The input that Dynamo saw, not the fake tensor made from it."""
    return getattr(node.meta.get("grapharg"), "example", None)


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    """The partitioner works on the graph it is given."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)


def _source(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)
