"""Measures memory and time of an eager training step, sparse beside dense, in fresh processes on the CPU.

    python benchmarks/eager_step.py [--density 0.25] [--block 64] [--dtype float32] [--tokens 32]

Prints the peak over the process's memory before the model was made, from the third step on, and what the formula
(weights + gradients + moments + index) says. Short sequences, so that weights dominate. Linux only: the peak is
the kernel's high-water mark of resident memory, reset before each measured step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from measuring import MIB, llama, machine, resident, restart_peak, run_json, spread

LAYERS, VOCABULARY = 8, 256


def measure(method: str, density: float, block: int, dtype: torch.dtype, num_tokens: int) -> dict[str, Any]:
    """Runs in the child: two steps to settle, then five measured ones."""
    import transformers  # noqa: F401  before the baseline

    import smet_compile as smet

    torch.ones(64, 64) @ torch.ones(64, 64)
    baseline = resident("VmRSS")
    net = llama(LAYERS, VOCABULARY, dtype)
    if method == "sparse":
        smet.sparsify(net, density, block_shape=block)
        optimizer: torch.optim.Optimizer = smet.ActiveAdamW(net, 1e-3, moment_dtype=_state_dtype(dtype))
    else:
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3, foreach=False)
    tokens = torch.randint(VOCABULARY, (1, num_tokens))
    peaks, seconds = [], []
    for _ in range(7):
        restart_peak()
        start = time.perf_counter()
        net(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        peaks.append(resident("VmHWM") - baseline)
    return {
        "peak": statistics.median(peaks[2:]),
        "seconds": statistics.median(seconds[2:]),
        "formula": formula(net, optimizer),
    }


def _state_dtype(dtype: torch.dtype) -> torch.dtype | None:
    return torch.bfloat16 if dtype == torch.bfloat16 else None


def formula(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Counts the bytes of weights, gradients, optimizer state, topology and index."""
    tensors = [*net.parameters(), *net.buffers()]
    gradients = list(net.parameters())
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in [*tensors, *gradients, *state])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=32, help="few: weights dominate memory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=("dense", "sparse"))
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.density, args.block, getattr(torch, args.dtype), args.tokens)))
        return
    pairs = [(child("dense", args), child("sparse", args)) for _ in range(args.repeats)]
    print(machine())
    print(f"density {args.density}, block {args.block}, {args.dtype}, {args.tokens} tokens; median of {args.repeats}")
    print("|  | dense | sparse | sparse / dense (spread) |\n|---|---|---|---|")
    for quantity, unit, scale in (("peak", "MiB", MIB), ("formula", "MiB", MIB), ("seconds", "s a step", 1)):
        dense, sparse = (statistics.median(pair[i][quantity] for pair in pairs) / scale for i in (0, 1))
        ratios = spread([s[quantity] / d[quantity] for d, s in pairs])
        print(f"| {quantity}, {unit} | {dense:.5g} | {sparse:.5g} | {ratios} |")


def child(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measures in a process of its own, whose allocator gives freed memory back at once."""
    options = [f"--{name}={getattr(args, name)}" for name in ("density", "block", "dtype", "tokens")]
    return run_json(__file__, f"--child={method}", *options, MALLOC_MMAP_THRESHOLD_="65536")


if __name__ == "__main__":
    main()
