"""Provides tools to trace a forward without side effects.

``Capture`` is a backend for ``torch.compile`` that keeps the graphs. ``capture_graphs`` runs a call through it once.
``leave_no_trace`` restores what a forward changes. ``run_op_by_op`` makes a forward run eagerly, one op after another.
"""

from __future__ import annotations

import itertools
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

if TYPE_CHECKING:
    from smet_compile.passes.graph import PassReport
    from smet_compile.passes.pipeline import Pass

_UNLIMITED = 2**20
_CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set)
_num_captured = itertools.count()


class SeveralGraphsError(Exception):
    """Says that a call did not become one graph."""


@dataclass
class Captured:
    """Holds one graph that Dynamo captured.

    Args:
        sources: Dynamo's name for each input of the graph, a Python expression. inputs: the inputs themselves.
        joint: the forward and backward graph after the passes. forward, backward: its two halves; the backward
            is None without training. reports: what each pass reported.
    """

    sources: list[str]
    inputs: list[Any] = field(default_factory=list)
    joint: fx.GraphModule | None = None
    forward: fx.GraphModule | None = None
    backward: fx.GraphModule | None = None
    reports: list[PassReport] = field(default_factory=list)

    def input_of(self, name: str) -> Any:
        """Returns the input that the placeholder ``name`` of ``joint`` stands for."""
        assert self.joint is not None
        placeholders = [node.name for node in self.joint.graph.find_nodes(op="placeholder")]
        return self.inputs[placeholders.index(name)]


class Capture:
    """Serves ``torch.compile`` as a backend that generates no code and keeps the graphs it is given in ``graphs``.

    It runs AOTAutograd, the passes and the partitioner. The compiler is imported at the first call: it takes seconds.

    Args:
        passes: the passes to run, in order; None for those that Inductor runs.
    """

    def __init__(self, passes: tuple[Pass, ...] | None = None) -> None:
        self.passes = passes
        self.graphs: list[Captured] = []

    def __call__(self, dynamo: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from functorch.compile import aot_module_simplified, make_boxed_func, min_cut_rematerialization_partition
        from torch._inductor.decomposition import select_decomp_table

        import_module("torch._inductor.lowering")  # the decomposition of max_pool2d uses it without an import
        placeholders = dynamo.graph.find_nodes(op="placeholder")
        graphs, number = self.graphs, len(self.graphs)
        graphs.append(Captured([_source(node) for node in placeholders], [_example(node) for node in placeholders]))

        # Dynamo keeps these functions, so they reach what they capture through the list, which can be emptied.
        def partition(
            joint: fx.GraphModule, joint_inputs: Any, **options: Any
        ) -> tuple[fx.GraphModule, fx.GraphModule]:
            captured = graphs[number]
            captured.reports = self._run_passes(joint)
            captured.joint = _copy(joint)
            halves: tuple[fx.GraphModule, fx.GraphModule] = min_cut_rematerialization_partition(
                joint, joint_inputs, compiler="inductor", **options
            )
            captured.forward, captured.backward = halves
            return halves

        def infer(graph: fx.GraphModule, example: Any) -> Any:
            captured = graphs[number]
            captured.reports = self._run_passes(graph)
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

    def _run_passes(self, module: fx.GraphModule) -> list[PassReport]:
        from smet_compile.passes.pipeline import PASSES, run_passes

        reports = run_passes(module.graph, PASSES if self.passes is None else self.passes)
        module.recompile()
        return reports


def _example(node: fx.Node) -> Any:
    """Returns the input that Dynamo saw, not the fake tensor made from it."""
    return getattr(node.meta.get("grapharg"), "example", None)


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    """Returns a copy of a graph, since the partitioner changes the one it is given."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)


def _source(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def capture_graphs(
    call: Callable[[], Any], *, fullgraph: bool = False, dynamic: bool | None = None
) -> tuple[list[Captured], list[str]]:
    """Compiles ``call`` afresh with ``Capture`` and runs it once, whatever was compiled or cached before.

    Args:
        call: a Python function or lambda. fullgraph: whether to raise where it does not become one graph.
        dynamic: whether sizes are symbols, as in ``torch.compile``.

    Returns the graphs, and the first line of each reason why Dynamo broke the call into several. With ``fullgraph`` it
    raises SeveralGraphsError instead.
    """
    from torch._dynamo import config
    from torch._dynamo.exc import Unsupported, UserError
    from torch._dynamo.utils import counters

    backend = Capture()
    # Dynamo keeps compiled code by code object, and remembers by its name which sizes changed, so both are new here.
    name = f"captured_{next(_num_captured)}"
    code = call.__code__.replace(co_name=name)
    fresh = types.FunctionType(code, call.__globals__, name, call.__defaults__, call.__closure__)
    before = dict(counters["graph_break"])
    with torch.compiler.set_stance("default"), config.patch(recompile_limit=_UNLIMITED):
        try:
            torch.compile(fresh, backend=backend, fullgraph=fullgraph, dynamic=dynamic)()
        except (Unsupported, UserError) as error:
            if fullgraph:
                raise SeveralGraphsError(_first_line(str(error))) from error
            raise
        finally:  # Dynamo keeps every backend
            graphs = backend.graphs.copy()
            backend.graphs.clear()
    breaks = [reason for reason, count in counters["graph_break"].items() if count > before.get(reason, 0)]
    return graphs, [_first_line(reason) for reason in breaks]


def _first_line(reason: str) -> str:
    return reason.strip().splitlines()[0] if reason.strip() else "unknown"


@contextmanager
def leave_no_trace(model: nn.Module, *, restore_buffers: bool = True) -> Iterator[None]:
    """Restores at its end what forwards of ``model`` changed: attributes, buffers and random state.

    Modules get back their attributes and the content of their dicts, lists and sets, so a cache that the first forward
    fills is empty again. What hooks store elsewhere stays changed. Parameters and their gradients are not copied, since
    a forward changes neither.

    Args:
        restore_buffers: whether to copy the buffers at the start and restore them; needless where tensors are fake.
    """
    devices = {t.device.index for t in model.parameters() if t.device.type == "cuda"}
    contents: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        _note_contents(vars(module), contents)
    buffers = [_without_repeats(buffer) for buffer in model.buffers()] if restore_buffers else []
    before = [buffer.clone() for buffer in buffers]
    with torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)):
        try:
            yield
        finally:
            for container, content in contents.values():
                _put_back(container, content)
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)


def _without_repeats(buffer: torch.Tensor) -> torch.Tensor:
    """Returns the entries of a buffer that lie in memory of their own; one that ``expand`` made repeats them."""
    for dim, stride in enumerate(buffer.stride() if buffer.layout is torch.strided else ()):
        if stride == 0 and buffer.shape[dim] > 1:
            buffer = buffer.narrow(dim, 0, 1)
    return buffer


def _note_contents(container: Any, contents: dict[int, tuple[Any, Any]]) -> None:
    """Copies the content of a dict, a list or a set, and of those within it, to ``contents``."""
    if type(container) not in _CONTAINERS or id(container) in contents:
        return
    contents[id(container)] = container, container.copy()
    for inner in container.values() if isinstance(container, dict) else container:
        _note_contents(inner, contents)


def _put_back(container: Any, content: Any) -> None:
    """Fills ``container`` with ``content``, unless it holds just that: torch.compile guards some containers."""
    before, after = (list(each.items() if isinstance(each, dict) else each) for each in (content, container))
    if len(before) == len(after) and all(_is_same(*pair) for pair in zip(before, after, strict=True)):
        return
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(content)


def _is_same(one: Any, other: Any) -> bool:
    """Tells whether two items are one object, or pairs of a key and a value that are."""
    are_pairs = isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other)
    return one is other or (are_pairs and all(a is b for a, b in zip(one, other, strict=True)))


@contextmanager
def run_op_by_op() -> Iterator[None]:
    """Makes a forward run eagerly, without autograd, and so that a dispatch mode sees each op that it is made of.

    ``torch.compile`` has no effect. Inference mode is off, since composite ops would stay whole in it, and so is the
    fast path of ``nn.TransformerEncoderLayer``, which is a single op. At the end the settings are as they were.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
