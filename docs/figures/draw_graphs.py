"""The figures of what the passes make of a graph."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, fx, nn

import smet_compile as smet
from smet_compile.ops import find_sites
from smet_compile.passes.graph import PACK, SAMPLED, calls
from smet_compile.passes.pipeline import PASSES, Pass
from smet_compile.tracing import Capture, Captured


def captured_step(sizes: tuple[int, ...], passes: tuple[Pass, ...]) -> tuple[Captured, nn.Module]:
    """The graphs of a training step of linear layers, tiles of 8, with the first so many ``passes``."""
    layers = [part for ends in itertools.pairwise(sizes) for part in (nn.Linear(*ends, bias=False), nn.Tanh())]
    model = smet.sparsify(nn.Sequential(*layers[:-1]), 0.25, block_shape=8)
    step = smet.compile_train_step(model, smet.ActiveAdamW(model), lambda model, x: model(x).square().mean())
    backend = Capture(passes)
    step.compile(backend=backend)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "smet_compile: a compiled graph runs without the passes")
        step(torch.randn(5, sizes[0]))
    return backend.graphs[0], model


def draw_graph() -> Figure:
    """The joint graph of one layer's training step, before and after the passes."""
    figure, columns = plt.subplots(1, 2, figsize=(13.5, 4.8))
    for axes, passes, title in zip(columns, ((), PASSES), ("as autograd traced it", "after the passes"), strict=True):
        captured, model = captured_step((24, 40), passes)
        assert captured.joint is not None
        made = [node for node in captured.joint.graph.nodes if node.op == "call_function"]
        work = [node for node in made if not _writes_back(node)]
        axes.axis("off")
        axes.set_title(title, fontsize=11, loc="left")
        for number, node in enumerate(work):
            color = (
                "tab:red" if _num_of([node], dense_sizes(model)) else "tab:blue" if "smet" in _line(node) else "black"
            )
            _write_line(axes, number, _line(node), color)
        _write_line(axes, len(work), f"{len(made) - len(work)} nodes that write the update back in place", "0.5")
    figure.suptitle("red: as large as the dense weight; blue: our ops", fontsize=9, y=0.02, va="bottom")
    figure.tight_layout()
    return figure


def _write_line(axes: Axes, number: int, line: str, color: str) -> None:
    axes.text(0, 0.97 - number / 20, line, family="monospace", fontsize=8, color=color)


def _writes_back(node: fx.Node) -> bool:
    """Of a functionalized update: its results, which are copied to what it changes in place."""
    return "getitem" in str(node.target) or "copy_" in str(node.target)


def _line(node: fx.Node) -> str:
    """``name = op(tensors)``; of a functionalized update, the op inside."""
    target, sources = str(node.target), [str(source) for source in node.all_input_nodes]
    target = str(node.args[0]) if "auto_functionalized" in target else target
    shown = ", ".join(sources[:3]) + (", ..." if len(sources) > 3 else "")
    return f"{node.name} = {target.removesuffix('.default')}({shown})"


def draw_passes() -> Figure:
    """What each pass takes away, counted in the graphs of four layers."""
    stages = {"no pass": 0} | {each.__name__: number + 1 for number, each in enumerate(PASSES[:-1])}
    counts = {name: count_tensors(*captured_step((24, 40, 56, 72, 88), PASSES[:k])) for name, k in stages.items()}
    figure, axes = plt.subplots(figsize=(11, 4.2))
    kinds = list(counts["no pass"])
    for number, kind in enumerate(kinds):
        places = [stage + (number - 1.5) * 0.2 for stage in range(len(stages))]
        bars = axes.bar(places, [count[kind] for count in counts.values()], 0.19, label=kind)
        axes.bar_label(bars, fontsize=8)
    axes.set_xticks(range(len(stages)), ["no pass", *(f"after\n{name}" for name in list(stages)[1:])], fontsize=9)
    axes.set_ylabel("tensors, of four weights")
    axes.legend(fontsize=9)
    figure.tight_layout()
    return figure


def count_tensors(captured: Captured, model: nn.Module) -> dict[str, int]:
    """Tensors of a dense weight's size in the halves of a step, and the most compact gradients that wait at once."""
    assert captured.forward is not None and captured.backward is not None
    sizes = dense_sizes(model)
    forward, backward = captured.forward.graph, captured.backward.graph
    return {
        "dense weights kept for backward": _num_of(forward.output_node().all_input_nodes, sizes),
        "dense tensors made in forward": _num_of(_made(forward), sizes),
        "dense tensors made in backward": _num_of(_made(backward), sizes),
        "compact gradients waiting for their update": _most_alive(backward, calls(backward, PACK, SAMPLED)),
    }


def dense_sizes(model: nn.Module) -> set[int]:
    return {site.layout.num_weights for site in find_sites(model).values()}


def _made(graph: fx.Graph) -> list[fx.Node]:
    """What takes memory of its own: neither inputs nor views."""
    views = [node for node in graph.nodes if getattr(node.target, "is_view", False)]
    return [node for node in graph.nodes if node.op == "call_function" and node not in views]


def _num_of(nodes: Iterable[fx.Node], sizes: set[int]) -> int:
    return sum(isinstance(node.meta.get("val"), Tensor) and node.meta["val"].numel() in sizes for node in nodes)


def _most_alive(graph: fx.Graph, nodes: list[fx.Node]) -> int:
    place = {node: number for number, node in enumerate(graph.nodes)}
    spans = [(place[node], max(place[user] for user in node.users)) for node in nodes]
    return max((sum(first <= now <= last for first, last in spans) for now, _ in spans), default=0)
