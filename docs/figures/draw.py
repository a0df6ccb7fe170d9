"""Draws the figures of docs/how_it_works.md, each from what the library computes on the spot.

python docs/figures/draw.py [format memory graph passes rule] [--out docs/figures]
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, fx, nn

import smet_compile as smet
from smet_compile.format import split_index
from smet_compile.ops import Site, find_sites
from smet_compile.passes.capture import Capture, Captured
from smet_compile.passes.graph import PACK, SAMPLED, calls
from smet_compile.passes.pipeline import PASSES, Pass

LATE, WARMUP, SHOWN_STEPS = 8000, 100, 130
RULES: dict[str, Callable[[nn.Module], smet.ActiveAdamW]] = {
    "correction by the global step (naive)": lambda model: smet.NaiveAdamW(model, lr_density_exponent=0.0),
    "by the block's age": lambda model: smet.ActiveAdamW(model, warmup_steps=0, lr_density_exponent=0.0),
    f"by age, warm-up W = {WARMUP} (SMET)": lambda model: smet.ActiveAdamW(
        model, warmup_steps=WARMUP, lr_density_exponent=0.0
    ),
}


def draw_format() -> Figure:
    """Two weights: as the module reads them, the bits, the values, the lists derived from the bits."""
    figure, rows = plt.subplots(2, 4, figsize=(13, 7.4), width_ratios=(3, 2.4, 1.8, 3))
    for axes, shape, block_shape in zip(rows, ((10, 14), (6, 9)), (4, 1), strict=True):
        layer = nn.Linear(shape[1], shape[0], bias=False)
        smet.sparsify(layer, 0.4, block_shape=block_shape, seed=1)
        (site,) = find_sites(layer).values()
        colors = plt.get_cmap("turbo")(torch.linspace(0.1, 0.9, site.num_active).tolist())
        _draw_dense(axes[0], site, colors)
        _draw_bits(axes[1], site)
        _draw_values(axes[2], site, colors)
        _write_lists(axes[3], site)
    figure.tight_layout()
    return figure


def _blank(axes: Axes, title: str, width: float, height: float) -> None:
    axes.set(xlim=(-0.2, width + 0.2), ylim=(height + 0.2, -0.2), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
    axes.axis("off")


def _draw_dense(axes: Axes, site: Site, colors: Any) -> None:
    layout, (bm, bn) = site.layout, site.layout.block_shape
    width, height = layout.block_cols * bn, layout.block_rows * bm
    _blank(axes, f"module.weight {tuple(layout.shape)} reads", width, height)
    for row, position in enumerate(site.mask().nonzero().flatten().tolist()):
        corner = position % layout.block_cols * bn, position // layout.block_cols * bm
        axes.add_patch(Rectangle(corner, bn, bm, facecolor=colors[row], edgecolor="white"))
        middle = (corner[0] + min(corner[0] + bn, layout.cols)) / 2, (corner[1] + min(corner[1] + bm, layout.rows)) / 2
        axes.text(*middle, str(row), ha="center", va="center", color="white", fontsize=9)
    axes.add_patch(Rectangle((layout.cols, 0), width - layout.cols, height, facecolor="white", alpha=0.7))
    axes.add_patch(Rectangle((0, layout.rows), layout.cols, height - layout.rows, facecolor="white", alpha=0.7))
    axes.add_patch(Rectangle((0, 0), layout.cols, layout.rows, fill=False, linewidth=1.5))
    if (layout.cols, layout.rows) != (width, height):
        axes.add_patch(Rectangle((0, 0), width, height, fill=False, linestyle=":"))
        axes.text(width, height + 0.6, "what hangs over the edge is zero, always", ha="right", va="top", fontsize=8)


def _draw_bits(axes: Axes, site: Site) -> None:
    layout, mask = site.layout, site.mask()
    num_bytes = site.compact.topology.numel()
    title = f"topology: {layout.num_blocks} bits in {num_bytes} bytes,\nrow-major: the truth"
    _blank(axes, title, layout.block_cols, layout.block_rows)
    for position, active in enumerate(mask.tolist()):
        corner = position % layout.block_cols, position // layout.block_cols
        axes.add_patch(Rectangle(corner, 1, 1, facecolor="0.8" if active else "white", edgecolor="0.6"))
        axes.text(corner[0] + 0.5, corner[1] + 0.5, str(int(active)), ha="center", va="center", fontsize=9)


def _draw_values(axes: Axes, site: Site, colors: Any) -> None:
    count, shape = site.num_active, tuple(site.values.shape)
    rows = min(count, 11)
    _blank(axes, f"values {shape},\nan nn.Parameter", -(-count // rows), rows)
    for row in range(count):
        corner = row // rows, row % rows
        axes.add_patch(Rectangle(corner, 0.92, 0.92, facecolor=colors[row]))
        axes.text(corner[0] + 0.46, corner[1] + 0.46, str(row), ha="center", va="center", color="white", fontsize=9)


def _write_lists(axes: Axes, site: Site) -> None:
    lists = split_index(site.compact.index[0], site.layout, site.num_active)._asdict()
    lines = [f"{name:14s} {tensor.tolist()}" for name, tensor in lists.items() if tensor is not None]
    axes.axis("off")
    axes.set_title("derived for kernels, never saved", fontsize=10)
    axes.text(0, 0.95, "\n\n".join(lines), family="monospace", fontsize=8, va="top", transform=axes.transAxes)


def draw_memory() -> Figure:
    """Bytes per dense weight of the tensors of a training step, by kind."""
    figure, columns = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True)
    cases: tuple[tuple[torch.dtype, Any], ...] = ((torch.float32, None), (torch.bfloat16, "int8"))
    for axes, (dtype, moments) in zip(columns, cases, strict=True):
        bars = {"dense\nAdamW": measure_bytes(dtype, moments, None, 1)}
        for density in (0.5, 0.25, 0.1):
            for name, block in (("single", 1), ("64 tiles", 64)):
                bars[f"{name}\nd = {density}"] = measure_bytes(dtype, moments, density, block)
        bottoms = dict.fromkeys(bars, 0.0)
        for kind in ("weights", "gradients", "moments", "ages", "index"):
            heights = {name: kinds[kind] for name, kinds in bars.items()}
            axes.bar(list(bars), list(heights.values()), 0.7, list(bottoms.values()), label=kind)
            bottoms = {name: bottoms[name] + heights[name] for name in bars}
        for name, total in bottoms.items():
            axes.text(name, total + 0.1, f"{total:.2f}", ha="center", fontsize=9)
        sort = "fp32 weights and moments" if moments is None else "bf16 weights, 8-bit moments (dense: bf16)"
        axes.set_title(sort, fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
    columns[0].set(ylabel="bytes per dense weight", ylim=(0, 17.5))
    columns[1].legend()
    figure.tight_layout()
    return figure


def measure_bytes(dtype: torch.dtype, moments: Any, density: float | None, block: int) -> dict[str, float]:
    """Bytes per dense weight of a layer of 1024 x 1024, by kind, as they lie in memory before an optimizer's step."""
    layer = nn.Linear(1024, 1024, bias=False, dtype=dtype)
    optimizer: torch.optim.Optimizer
    if density is None:
        optimizer = torch.optim.AdamW(layer.parameters())
    else:
        smet.sparsify(layer, density, block_shape=block)
        optimizer = smet.ActiveAdamW(layer, state_dtype=moments)
    (weight,) = layer.parameters()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    moment_keys = {"exp_avg", "exp_avg_sq", "scales"}
    kinds: dict[str, Iterable[Any]] = {
        "weights": [weight],
        "gradients": [weight.grad],
        "moments": [state[key] for key in moment_keys & state.keys()],
        "ages": [state[key] for key in state.keys() - moment_keys],
        "index": layer.buffers(),
    }
    sizes = {kind: sum(t.nbytes for t in tensors if isinstance(t, Tensor)) for kind, tensors in kinds.items()}
    return {kind: num_bytes / 1024**2 for kind, num_bytes in sizes.items()}


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


def draw_rule() -> Figure:
    """Size of a grown weight's first steps, for a gradient that is constant and for one that is noise."""
    figure, columns = plt.subplots(1, 2, figsize=(12, 4.4), sharey=True)
    ages = range(1, SHOWN_STEPS + 1)
    for label, make in RULES.items():
        for axes, sizes_T in zip(columns, steps_after_growth(make), strict=True):
            axes.plot(ages, sizes_T, label=label)
            peak = int(sizes_T.argmax())
            for place in {0, peak} if sizes_T[peak] > 1.5 else ():
                said = f"{sizes_T[place]:.2f} at t = {place + 1}"
                axes.annotate(said, (place + 1, sizes_T[place]), (6, 2), textcoords="offset points", fontsize=9)
                axes.plot(place + 1, sizes_T[place], "ko", markersize=3)
    for axes, title in zip(columns, ("constant gradient", "gradient of pure noise (mean over weights)"), strict=True):
        axes.set(title=title, xlabel="t, steps since growth", yscale="log", ylim=(0.008, 10))
    columns[0].set_ylabel("size of the step / learning rate")
    columns[0].legend(fontsize=9, loc="lower right")
    figure.tight_layout()
    return figure


def steps_after_growth(make: Callable[[nn.Module], smet.ActiveAdamW], late: int = LATE) -> list[Tensor]:
    """(SHOWN_STEPS,) mean |step| / lr of the blocks grown after ``late`` steps: constant gradient, noise."""
    generator = torch.Generator().manual_seed(0)
    model = smet.sparsify(nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(2)), 0.25)
    optimizer = make(model)
    manager = smet.TopologyManager(
        model, optimizer, total_steps=8 * late, every=late, drop_fraction=0.25, schedule="constant"
    )
    constant, noisy = (site.values for site in find_sites(model).values())
    moved: list[list[Tensor]] = [[], []]
    for step in range(1, late + SHOWN_STEPS + 1):
        constant.grad = torch.ones_like(constant)
        noisy.grad = torch.randn(noisy.shape, generator=generator)
        before = [values.detach().clone() for values in (constant, noisy)]
        optimizer.step()
        if step > late:
            for sizes, old, values in zip(moved, before, (constant, noisy), strict=True):
                grown = optimizer.block_ages(values) == step - late
                sizes.append((old - values.detach())[grown].abs().mean() / optimizer.param_groups[0]["lr"])
        manager.step()
    return [torch.stack(sizes) for sizes in moved]


FIGURES = {"format": draw_format, "memory": draw_memory, "graph": draw_graph, "passes": draw_passes, "rule": draw_rule}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(FIGURES)}; default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the PNG files")
    args = parser.parse_args()
    for name in args.names or FIGURES:
        torch.manual_seed(0)
        FIGURES[name]().savefig(args.out / f"{name}.png", dpi=110)
        print(args.out / f"{name}.png")


if __name__ == "__main__":
    main()
