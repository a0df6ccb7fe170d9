"""Peak memory of an eager training step, sparse beside dense, each in a fresh process on the CPU.

    python benchmarks/eager_memory.py [--density 0.25] [--block 64] [--dtype float32]

Prints the peak over the process's memory before the model was made, from the third step on, and what the formula
(weights + gradients + moments + index) says. Short sequences, so that weights dominate. Linux only: the peak is
the kernel's high-water mark of resident memory, reset before each measured step.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HIDDEN, INTERMEDIATE, HEADS, LAYERS, VOCABULARY = 1024, 2736, 16, 8, 256
TOKENS = 32
MIB = 2**20


def model(dtype: torch.dtype) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
    )
    return LlamaForCausalLM(config).to(dtype)


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(method: str, density: float, block: int, dtype: torch.dtype) -> dict[str, Any]:
    """Runs in the child: four steps, peaks of the last two."""
    import transformers  # noqa: F401  before the baseline

    import smet_compile as smet

    torch.ones(64, 64) @ torch.ones(64, 64)
    baseline = resident("VmRSS")
    net = model(dtype)
    if method == "sparse":
        smet.sparsify(net, density, block_shape=block)
        optimizer: torch.optim.Optimizer = smet.ActiveAdamW(net, 1e-3, state_dtype=_state_dtype(dtype))
    else:
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3, foreach=False)
    tokens = torch.randint(VOCABULARY, (1, TOKENS))
    peaks = []
    for _ in range(4):
        Path("/proc/self/clear_refs").write_text("5")
        net(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        peaks.append(resident("VmHWM") - baseline)
    return {"peak": statistics.median(peaks[2:]), "formula": formula(net, optimizer)}


def _state_dtype(dtype: torch.dtype) -> torch.dtype | None:
    return torch.bfloat16 if dtype == torch.bfloat16 else None


def formula(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, gradients, optimizer state, topology and index, as they lie in memory."""
    tensors = [*net.parameters(), *net.buffers()]
    gradients = list(net.parameters())
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in [*tensors, *gradients, *state])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=("dense", "sparse"))
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.density, args.block, getattr(torch, args.dtype))))
        return
    rows = {method: [child(method, args) for _ in range(args.repeats)] for method in ("dense", "sparse")}
    dense, sparse = ([row["peak"] for row in rows[method]] for method in ("dense", "sparse"))
    ratios = [s / d for s, d in zip(sparse, dense, strict=True)]
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    print(f"density {args.density}, block {args.block}, {args.dtype}, median of {args.repeats} (spread)")
    print("|  | peak MiB | formula MiB |\n|---|---|---|")
    for method, peaks in (("dense", dense), ("sparse", sparse)):
        low, middle, high = (x / MIB for x in (min(peaks), statistics.median(peaks), max(peaks)))
        print(f"| {method} | {middle:.0f} ({low:.0f}-{high:.0f}) | {rows[method][0]['formula'] / MIB:.0f} |")
    expected = rows["sparse"][0]["formula"] / rows["dense"][0]["formula"]
    print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}), by the formula {expected:.3f}")


def child(method: str, args: argparse.Namespace) -> dict[str, Any]:
    options = [f"--{name}={getattr(args, name)}" for name in ("density", "block", "dtype")]
    command = [sys.executable, __file__, f"--child={method}", *options]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


if __name__ == "__main__":
    main()
