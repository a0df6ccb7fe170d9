"""Measures one compiled training run in a process of its own, which ``compiled_step.py`` starts."""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import llama, peaks
from torch.optim.optimizer import register_optimizer_step_pre_hook

import smet_compile as smet

DENSE, LOOP, FUSED = "dense", "two calls", "fused"
METHODS = (DENSE, LOOP, FUSED)


class Training:
    """Trains a model in bfloat16, always on the same batch of random tokens."""

    def __init__(self, method: str, checkpointing: bool, args: argparse.Namespace) -> None:
        self.method = method
        self.model = llama(args.layers, args.vocabulary, torch.bfloat16, args.hidden).train()
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tokens = torch.randint(args.vocabulary, (1, args.tokens))
        self.batch = {"input_ids": tokens, "labels": tokens}
        if method == DENSE:
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)
        else:
            smet.sparsify(self.model, args.density, block_shape=args.block)
            self.optimizer = smet.ActiveAdamW(self.model, 1e-3, moment_dtype=torch.bfloat16)
        self.step = self._fused() if method == FUSED else self._two_calls()

    def _fused(self) -> Callable[[], Any]:
        step = smet.compile_train_step(self.model, self.optimizer)
        return lambda: step(self.batch)

    def _two_calls(self) -> Callable[[], Any]:
        compiled = torch.compile(self.model)

        def step() -> None:
            compiled(**self.batch).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return step

    def formula(self) -> int:
        """Counts the bytes that are needed: weights, gradients, two moments of the weights' dtype, and the index."""
        compact = {id(parameter) for name, parameter in self.model.named_parameters() if "parametrizations" in name}
        total = sum(buffer.nbytes for buffer in self.model.buffers())
        for parameter in self.model.parameters():
            no_gradient = self.method == FUSED and id(parameter) in compact
            total += parameter.nbytes * (3 if no_gradient else 4)
        return total


def memory(training: Training, num_steps: int) -> dict[str, Any]:
    """Returns the peak bytes of a step from the third on, over what is resident when all tensors are empty.

    See ``peaks``.
    """
    resident, allocated = peaks(training.step, num_steps)
    return {"resident": resident, "allocated": allocated, "formula": training.formula()}


def times(training: Training, num_steps: int) -> dict[str, Any]:
    """Returns the seconds of the first forward and backward over those of a later one, and of a whole later step."""
    optimizing: list[Clock] = []
    # A hook of this optimizer alone would be given every gradient.
    clock = register_optimizer_step_pre_hook(lambda *_: optimizing.append(Clock()))
    firsts, wholes = [], []
    for _ in range(1 + num_steps):
        start = Clock()
        training.step()
        wholes.append(Clock().since(start))
        firsts.append(optimizing[-1].since(start))
    clock.remove()
    later = {key: statistics.median(each[key] for each in firsts[1:]) for key in firsts[0]}
    return {
        "compile": firsts[0]["wall"] - later["wall"],
        "compile_cpu": firsts[0]["cpu"] - later["cpu"],
        "step": statistics.median(each["wall"] for each in wholes[1:]),
    }


class Clock:
    """Holds a moment by the wall, and by the processor time of this process and of the compilers that it ran."""

    def __init__(self) -> None:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        self.cpu = sum(each.ru_utime + each.ru_stime for each in used)
        self.wall = time.perf_counter()

    def since(self, earlier: Clock) -> dict[str, float]:
        return {"wall": self.wall - earlier.wall, "cpu": self.cpu - earlier.cpu}
