"""Provides what the benchmarks share: resident memory, child processes, the name of the machine. Linux only."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
HIDDEN, INTERMEDIATE, HEAD_SIZE = 1024, 2736, 64


def llama(
    num_layers: int,
    vocabulary: int,
    dtype: torch.dtype,
    hidden: int = HIDDEN,
    intermediate: int | None = None,
    heads: int | None = None,
) -> torch.nn.Module:
    """Makes a LLaMA model with the layers of LLaMA-350m, or others, by default of the same proportions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate or INTERMEDIATE * hidden // HIDDEN,
        num_attention_heads=heads or max(1, hidden // HEAD_SIZE),
        num_hidden_layers=num_layers,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def resident(field: str) -> int:
    """Reads VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def restart_peak() -> None:
    """Resets VmHWM to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def at_rest() -> int:
    """Returns the resident bytes, after the allocator has returned what it kept back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def storages() -> list[torch.UntypedStorage]:
    """Returns the storage of every tensor that Python knows of, each once, without fake and sparse ones."""
    found = {}
    for each in gc.get_objects():
        if (
            type(each) in (torch.Tensor, torch.nn.Parameter)
            and each.device.type == "cpu"
            and each.layout == torch.strided
        ):
            found[each.untyped_storage()._cdata] = each.untyped_storage()
    return list(found.values())


def empty_all_tensors() -> None:
    """Frees the memory of all tensors, whoever holds them."""
    for storage in storages():
        if storage.resizable():
            storage.resize_(0)


def peaks(step: Callable[[], Any], num_steps: int) -> tuple[int, int]:
    """Returns the peak bytes of a step from the third on: resident and by torch's allocator. Nothing works afterwards.

    The resident ones are over what is resident when all tensors are empty. They are measured in two parts, since the
    profiler leaves memory behind as well: the peak over the rest between steps, and how much of that rest goes when the
    tensors are emptied.
    """
    for _ in range(2):
        step()
    at_rest()
    restart_peak()
    for _ in range(num_steps):
        step()
    over_rest = resident("VmHWM") - at_rest()
    allocated = peak_allocated(step)
    rest = at_rest()
    empty_all_tensors()
    return over_rest + rest - at_rest(), allocated


def peak_allocated(step: Callable[[], Any]) -> int:
    """Returns the most bytes that tensors hold at once during ``step``, by torch's allocator, which is exact."""
    gc.collect()
    return sum(storage.nbytes() for storage in storages()) + peak_beyond(step)


def peak_beyond(step: Callable[[], Any]) -> int:
    """Returns the most bytes that tensors hold during ``step`` beyond those before, by torch's allocator."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    peak = now = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def run_json(script: str, *options: str, **environment: str) -> dict[str, Any]:
    """Runs ``script`` in a process of its own, and returns the JSON that it prints last."""
    done = subprocess.run(
        [sys.executable, script, *options], stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    done.check_returncode()
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def spread(numbers: Sequence[float], digits: str = ".3f") -> str:
    """Writes the median, and the least and the largest."""
    return f"{statistics.median(numbers):{digits}} ({min(numbers):{digits}}-{max(numbers):{digits}})"


def machine() -> str:
    return f"torch {torch.__version__}, {processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
