"""Measures memory, compile and step time of compiled bf16 training, sparse beside dense, in fresh processes.

    python benchmarks/compiled_step.py [--layers 8] [--vocabulary 32000] [--density 0.25] [--block 64] [--repeats 3]

LLaMA-350m's shapes on the CPU. Three ways, each with and without activation checkpointing: dense (``torch.compile``,
``loss.backward()``, ``torch.optim.AdamW``), sparse in the same two calls with ``ActiveAdamW``, sparse in one
(``smet.compile_train_step``). Weights, gradients and moments are bf16; few tokens, so that weights dominate.

Memory: the high-water mark of resident memory over the steps from the third on, less what is resident after them
when every tensor has been emptied in place. That rest is Python, torch and what compiling left behind; it is
taken off in the same way from each, whether its cache was warm or cold. "allocated" is the same peak by torch's
allocator, exact, without libraries' own scratch. The formula counts weights, gradients, moments and index.

Compile time: the first forward and backward less a later one, caches cold. Wall time says what a user waits for;
processor time (with the C++ compilers') is what to compare on a machine that does other work as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from typing import Any

from compiled_training import DENSE, FUSED, LOOP, METHODS, Training, memory, times
from measuring import MIB, machine, run_json, spread

RETURNED_FROM = 384 * 1024
"""Bytes from which on freed memory goes back to the system at once: gradients do, an update's scratch does not."""
Runs = dict[tuple[str, bool], list[dict[str, Any]]]


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="the whole model has 24")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000, help="embedding and head stay dense")
    parser.add_argument("--tokens", type=int, default=32, help="few: weights dominate memory")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="measured in each process")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("memory", "times"))
    parser.add_argument("--caches", help="where to keep compiled code for a later run of the memory measurement")
    parser.add_argument("--child", nargs=3, metavar=("QUANTITY", "METHOD", "CHECKPOINTING"), help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = options().parse_args()
    if args.child:
        print(json.dumps(measure(args, *args.child)))
        return
    print(machine())
    print(
        f"{args.layers} layers, hidden {args.hidden}, vocabulary {args.vocabulary}, {args.tokens} tokens, bfloat16; "
        f"density {args.density}, block {args.block}; median of {args.repeats} (spread)\n"
    )
    with tempfile.TemporaryDirectory() as fresh:
        if args.only != "times":
            print_memory(
                rounds(args, "memory", (False, True), args.caches or fresh, MALLOC_MMAP_THRESHOLD_=str(RETURNED_FROM))
            )
        if args.only != "memory":
            print_times(rounds(args, "times", (False,), fresh))


def measure(args: argparse.Namespace, quantity: str, method: str, checkpointing: str) -> dict[str, Any]:
    """Measures in the child process."""
    training = Training(method, checkpointing == "True", args)
    return {"memory": memory, "times": times}[quantity](training, args.steps)


def rounds(
    args: argparse.Namespace, quantity: str, checkpointings: tuple[bool, ...], caches: str, **environment: str
) -> Runs:
    """Runs every configuration once a round. Memory may use what an earlier round compiled, time may not."""
    runs: Runs = {}
    names = ("layers", "hidden", "vocabulary", "tokens", "density", "block", "steps")
    sizes = [f"--{name}={getattr(args, name)}" for name in names]
    for number in range(args.repeats):
        for checkpointing in checkpointings:
            for method in METHODS:
                cache = f"{caches}/{METHODS.index(method)}-{checkpointing}" + f"-{number}" * (quantity == "times")
                child = ("--child", quantity, method, str(checkpointing))
                result = run_json(__file__, *sizes, *child, TORCHINDUCTOR_CACHE_DIR=cache, **environment)
                runs.setdefault((method, checkpointing), []).append(result)
                print(number, method, checkpointing, result, file=sys.stderr, flush=True)
    return runs


def print_memory(runs: Runs) -> None:
    print("| peak, MiB | resident (spread) | allocated | formula | resident / dense (spread) | formula | over it |")
    print("|---|---|---|---|---|---|---|")
    for (method, checkpointing), results in runs.items():
        name = method + (", checkpointing" if checkpointing else "")
        dense = runs[DENSE, checkpointing]
        absolute = [spread([each["resident"] / MIB for each in results], ".0f")]
        absolute += [f"{results[0][quantity] / MIB:.0f}" for quantity in ("allocated", "formula")]
        ratios = [each["resident"] / other["resident"] for each, other in zip(results, dense, strict=True)]
        wanted = results[0]["formula"] / dense[0]["formula"]
        cells = [name, *absolute, spread(ratios), f"{wanted:.3f}", f"{statistics.median(ratios) - wanted:+.3f}"]
        print(f"| {' | '.join(cells)} |")
    _print_fused(runs)


def _print_fused(runs: Runs) -> None:
    """Prints what the fused update saves, and how it compares under activation checkpointing."""
    for quantity in ("resident", "allocated"):
        peaks = {key: statistics.median(each[quantity] for each in results) for key, results in runs.items()}
        saved = (peaks[LOOP, False] - peaks[FUSED, False]) / MIB
        ratio = peaks[FUSED, True] / peaks[LOOP, True]
        print(
            f"\n{quantity}: fused {saved:.1f} MiB below two calls; with checkpointing {ratio:.3f} of two calls", end=""
        )
    gradients = (runs[LOOP, False][0]["formula"] - runs[FUSED, False][0]["formula"]) / MIB
    print(f"\ncompact gradients: {gradients:.1f} MiB\n")


def print_times(runs: Runs) -> None:
    print("| seconds | compile (spread) | / dense | processor time (spread) | / dense | step (spread) | / dense |")
    print("|---|---|---|---|---|---|---|")
    for (method, checkpointing), results in runs.items():
        cells = [method]
        for quantity, digits in (("compile", ".1f"), ("compile_cpu", ".1f"), ("step", ".2f")):
            dense = runs[DENSE, checkpointing]
            ratios = [each[quantity] / other[quantity] for each, other in zip(results, dense, strict=True)]
            cells += [spread([each[quantity] for each in results], digits), spread(ratios, ".2f")]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
