"""Measures forward and backward of one linear layer in eager mode, compact beside dense, in turns in one process.

    python -m benchmarks.eager_layer [--tokens 2048 32] [--repeats 15]

``direct`` is what a layer does, ``unpacked`` the same with its weight read (``SMET_COMPILE_EAGER=unpack``). The
gradients of input, weight and bias are computed; there is no optimizer. fp32, density 0.25, on the CPU.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

import smet_compile as smet
from benchmarks.layer import DENSITY, Block
from benchmarks.measuring import machine, spread
from benchmarks.ratios import Clock, Work, in_turns
from smet_compile.ops import direct

INPUTS, OUTPUTS = 768, 2048
BLOCKS: dict[str, Block] = {"64 tiles": 64, "single weights": 1, "runs of 16": (1, 16)}
LIMITS = {("64 tiles", 2048): 0.35, ("64 tiles", 32): 1.3, ("single weights", 2048): 0.6}


class Layer:
    """Is a layer with the tokens and the gradients of a step."""

    def __init__(self, tokens: int, block: Block | None) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS))
        if block is not None:
            smet.sparsify(self.model, DENSITY, block_shape=block)
        self.input: Tensor = torch.randn(tokens, INPUTS, requires_grad=True)
        self.grad = torch.randn(tokens, OUTPUTS)

    def step(self, unpacked: bool = False) -> None:
        context: AbstractContextManager[object] = direct.unpacked() if unpacked else nullcontext()
        self.input.grad = None
        self.model.zero_grad()
        with context:
            self.model(self.input).backward(self.grad)


def rows(tokens: int, repeats: int) -> list[str]:
    """Returns the rows of the table for a number of tokens."""
    layers = [Layer(tokens, block) for block in BLOCKS.values()]
    works: list[Work] = [work for layer in layers for work in (layer.step, lambda layer=layer: layer.step(True))]
    pairs = in_turns(Layer(tokens, None).step, works, repeats, Clock(torch.device("cpu")))
    found = []
    for number, name in enumerate(BLOCKS):
        after, before = pairs[2 * number], pairs[2 * number + 1]
        limit = LIMITS.get((name, tokens))
        found.append(
            f"| {name}, {tokens} tokens | {1e3 * after.medians[0]:.2f} | {spread(after.costs, '.2f')} | "
            f"{spread(before.costs, '.2f')} | {'' if limit is None else f'at most {limit}'} |"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 32])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    print(f"{machine()}; {INPUTS}→{OUTPUTS}, density {DENSITY}, fp32; median (least-largest) of {args.repeats}")
    print("| layer | dense, ms | direct / dense | unpacked / dense | target |\n|---|---|---|---|---|")
    for tokens in args.tokens:
        print("\n".join(rows(tokens, args.repeats)), flush=True)


if __name__ == "__main__":
    main()
