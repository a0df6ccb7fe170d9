"""What the benchmarks share: resident memory, processes of their own, and on what was measured. Linux only."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

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
    """LLaMA-350m's layers, or others: of the same proportions where nothing else is said."""
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
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def restart_peak() -> None:
    """VmHWM starts anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def at_rest() -> int:
    """Bytes resident between steps, once what the allocator kept back is returned."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def storages() -> list[torch.UntypedStorage]:
    """The memory of every tensor that Python knows of, each once; not that of fake ones."""
    found = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type == "cpu":
            found[each.untyped_storage()._cdata] = each.untyped_storage()
    return list(found.values())


def empty_all_tensors() -> None:
    """Takes their memory away from all tensors, whoever holds them."""
    for storage in storages():
        if storage.resizable():
            storage.resize_(0)


def run_json(script: str, *options: str, **environment: str) -> dict[str, Any]:
    """The JSON that ``script`` prints last, in a process of its own."""
    done = subprocess.run(
        [sys.executable, script, *options], stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    done.check_returncode()
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def spread(numbers: Sequence[float], digits: str = ".3f") -> str:
    """Median, and the least and the largest."""
    return f"{statistics.median(numbers):{digits}} ({min(numbers):{digits}}-{max(numbers):{digits}})"


def machine() -> str:
    return f"torch {torch.__version__}, {processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
