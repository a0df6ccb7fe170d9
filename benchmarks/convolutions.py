"""Times convolutions with compact weights, forward and both gradients, beside dense ones, on one thread of a CPU.

    python -m benchmarks.convolutions [--rounds 7] [--out docs/results/convolutions.md]

For a 3x3 kernel it compares what compiled graphs do, which is to unpack the weight for a dense convolution and to pack
its gradient, with products over unfolded inputs. For a 1x1 kernel it compares that with products over channels, in both
memory formats, and with a linear layer of as many tokens. All variants of a row are timed by turns. The table shows the
medians of the times relative to dense in the same memory format, and the least and largest of the products.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from smet_compile.format import Layout, Topology
from smet_compile.ops.plain import pack, unpack

SHAPES = ((32, 64, 64, 16), (32, 128, 128, 8), (32, 256, 256, 8))
"""Images, channels in, channels out, and the side of an image."""
DENSITIES, BLOCKS = (0.1, 0.05, 0.03), (1, 32)
Variant = Callable[[], object]


def gradients(x: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    pad = weight.shape[-1] // 2
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return found[0], found[1]


def variants(
    shape: tuple[int, int, int, int], kernel: int, density: float, block: int, memory_format: torch.memory_format
) -> dict[str, Variant]:
    """Returns the ways to compute a convolution and its two gradients, by name."""
    count, inputs, outputs, side = shape
    x, weight = torch.randn(count, inputs, side, side), torch.randn(outputs, inputs, kernel, kernel)
    grad, pad = torch.randn(count, outputs, side, side), kernel // 2
    x, grad = x.contiguous(memory_format=memory_format), grad.contiguous(memory_format=memory_format)
    layout = Layout.of(weight.shape, (block, block), flatten=True)
    mask = torch.rand(layout.num_blocks).argsort().argsort() < layout.num_active(density)
    topology = Topology.from_mask(mask, layout)
    values = pack(weight, topology)
    flat = Topology.from_mask(mask, Layout(layout.matrix, layout.matrix, layout.block_shape))
    arguments = flat.bits, flat.lists, flat.layout.text

    def dense() -> object:
        return F.conv2d(x, weight, padding=pad), gradients(x, grad, weight)

    def unpacked() -> object:
        out = F.conv2d(x, unpack(values, topology), padding=pad)
        to_input, to_weight = gradients(x, grad, unpack(values, topology))
        return out, to_input, pack(to_weight, topology)

    def products() -> object:
        if kernel == 1:
            tokens = x.permute(0, 2, 3, 1).reshape(-1, inputs)
        else:
            tokens = F.unfold(x, kernel, padding=pad).transpose(1, 2).reshape(-1, layout.cols)
        out = torch.ops.smet.masked_matmul(tokens, values, *arguments, True)
        grad_tokens = grad.permute(0, 2, 3, 1).reshape(-1, outputs)
        to_tokens = torch.ops.smet.masked_matmul(grad_tokens, values, *arguments, False)
        to_values = torch.ops.smet.sampled_matmul(grad_tokens, tokens, *arguments, flat.num_active)
        out = out.view(count, side, side, outputs).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
        if kernel == 1:
            to_input = (
                to_tokens.view(count, side, side, inputs).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
            )
        else:
            columns = to_tokens.view(count, side * side, -1).transpose(1, 2)
            to_input = F.fold(columns, (side, side), kernel, padding=pad)
        return out, to_input, to_values

    def linear() -> object:
        out = torch.ops.smet.masked_matmul(tokens_of_linear, values, *arguments, True)
        to_input = torch.ops.smet.masked_matmul(out, values, *arguments, False)
        return out, to_input, torch.ops.smet.sampled_matmul(out, tokens_of_linear, *arguments, flat.num_active)

    found: dict[str, Variant] = {"dense": dense, "unpacked": unpacked, "products": products}
    if kernel == 1:
        tokens_of_linear = torch.randn(count * side * side, inputs)
        found["linear"] = linear
    check(unpacked(), products())
    return found


def check(expected: object, actual: object) -> None:
    """Refuses to time variants that do not agree."""
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-2)


def ratios(timed: dict[str, Variant], rounds: int) -> dict[str, list[float]]:
    """Returns the times of each variant relative to those of the first, round by round, sorted."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds + 1):
        for name, call in timed.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    first = times[next(iter(timed))][1:]
    return {name: sorted(t / base for t, base in zip(all[1:], first, strict=True)) for name, all in times.items()}


HEADER = (
    "| kernel | format | images, in, out, side | block | density | unpacked | products | linear | least, largest |\n"
)
HEADER += "|---|---|---|---|---|---|---|---|---|"
PAGE = """# Convolutions with compact weights

Forward and both gradients on one thread of a CPU, relative to a dense convolution in the same memory format.
*Unpacked*: the weight is unpacked for a dense convolution and its gradient packed, which is what compiled graphs do
with a 3x3 kernel. *Products*: over unfolded inputs for 3x3; over channels for 1x1, which is what compiled graphs do
with a 1x1 kernel; the last column has the least and the largest of their rounds. *Linear*: a sparse linear layer of as
many tokens.

Made by `python -m benchmarks.convolutions --out docs/results/convolutions.md`: medians of {rounds} rounds, all variants
of a row by turns; torch {torch}; load of the machine at the end: {load:.0f} on {cores} cores. Where others use the
machine too, single numbers are unreliable: look at what the rows of a kernel have in common.

{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="the page to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = [HEADER]
    print(HEADER)
    cases = [(3, "first"), (1, "first"), (1, "last")]
    for (kernel, form), shape, block, density in itertools.product(cases, SHAPES, BLOCKS, DENSITIES):
        memory_format = torch.channels_last if form == "last" else torch.contiguous_format
        found = ratios(variants(shape, kernel, density, block, memory_format), args.rounds)
        middle = {name: f"{statistics.median(each):.2f}" for name, each in found.items()}
        cells = [middle.get(name, "") for name in ("unpacked", "products", "linear")]
        spread = f"{found['products'][0]:.2f}, {found['products'][-1]:.2f}"
        lines.append(f"| {kernel} | {form} | {shape} | {block} | {density} | {' | '.join(cells)} | {spread} |")
        print(lines[-1], flush=True)
    if args.out is not None:
        write_first_part(args.out, page("\n".join(lines), args.rounds))


def write_first_part(path: Path, text: str) -> None:
    """Writes the page up to its first section; sections are those of ``benchmarks.image_steps``."""
    known = path.read_text() if path.exists() else ""
    _, heading, sections = known.partition("\n## ")
    path.write_text(text + heading + sections)


def page(table: str, rounds: int) -> str:
    cores = os.cpu_count()
    return PAGE.format(table=table, rounds=rounds, torch=torch.__version__, load=os.getloadavg()[0], cores=cores)


if __name__ == "__main__":
    main()
