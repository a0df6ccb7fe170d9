"""Trains many replicas side by side, and returns the records that `train` would have made of each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import processor
from benchmarks.studies.case import Shape
from benchmarks.studies.replica import COMMON, Replica
from benchmarks.studies.replica_model import ManyModels, initial_values
from benchmarks.studies.replica_optimizer import Aging, Masked, Moments, step_masked, step_plain
from benchmarks.studies.replica_topology import Movement, Reading, Topology
from benchmarks.studies.trainer import FINAL_WINDOWS, corpus_of, schedule

_WINDOWS_AT_ONCE = 32
_NUM_MEANS = 50  # of the training loss, in a record
_NUM_REPORTS = 10
_MOMENTUM = 0.9


class Replicas:
    """Holds the replicas: stacked parameters (E, ...), their moments, and the topology of every sparse weight."""

    def __init__(self, cases: Sequence[Replica], eager: bool = False) -> None:
        for name in COMMON:
            if len(different := {getattr(case, name) for case in cases}) > 1:
                raise ValueError(f"{name}: expected one for all replicas, got {different}; train them in two batches")
        self.cases = cases
        self.shape: Shape = cases[0].shape
        self._compile: Callable[..., Any] = (lambda function: function) if eager else _compiled
        self.topologies: list[dict[str, Topology]] = []
        self.movements = [Movement() for _ in cases]
        self.parts = self._stack()
        self._masked = {name: part for name, part in self.parts.items() if isinstance(part, Masked)}
        self._plain = {name: part for name, part in self.parts.items() if name not in self._masked}
        self._plain_rates = self._column([c.rate if c.plain_rate is None else c.plain_rate for c in cases]).flatten()
        self._aging = Aging(self._column([c.local_age for c in cases]), self._column([c.block_warmup for c in cases]))
        self._corpora = {case.seed: corpus_of(case) for case in cases}
        models = ManyModels(self.shape, list(self.parts), [case.head_scale for case in cases])
        self._losses = self._compile(models.losses)
        self._step_masked, self._step_plain = self._compile(step_masked), self._compile(step_plain)
        self._summed: dict[tuple[int, str], Tensor] = {}

    def _stack(self) -> dict[str, Moments]:
        """Draws the parameters and topologies of all replicas."""
        drawn = cache(lambda seed: initial_values(next(case for case in self.cases if case.seed == seed)))
        self.topologies = [
            {
                name: Topology.draw(c, name, drawn(c.seed)[0][name].shape)
                for name in drawn(c.seed)[1]
                if c.is_sparse(name)
            }
            for c in self.cases
        ]
        names, linear = drawn(self.cases[0].seed)
        parts: dict[str, Moments] = {}
        for name in names:
            weight = torch.stack([drawn(case.seed)[0][name] for case in self.cases])
            parts[name] = self._masked_part(name, weight) if name in linear else _fresh(Moments, weight)
        return parts

    def _masked_part(self, name: str, weight: Tensor) -> Masked:
        mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        rates, warmups = [], []
        for index, (case, topologies) in enumerate(zip(self.cases, self.topologies, strict=True)):
            topology, factor, rate, warmup = topologies.get(name), case.spread, case.rate, 0
            if topology:
                mask[index] = topology.grid.spread(topology.active)
                factor *= topology.density**-0.5 if case.rescale else 1.0
                rate *= topology.density**-case.exponent
                warmup = case.block_warmup if case.first_warmup is None else case.first_warmup
            weight[index] *= factor
            rates.append(rate)
            warmups.append(warmup)
        births = torch.zeros(weight.shape, dtype=torch.int32, device=weight.device)
        weight *= mask
        return _fresh(Masked, weight, mask, births, self._column(rates), self._column(warmups))

    def _column(self, numbers: Sequence[Any]) -> Tensor:
        """Returns one number of each replica as (E, 1, 1), fp32 or bool."""
        column = torch.tensor(numbers, device=self.shape.device).view(-1, 1, 1)
        return column if column.dtype == torch.bool else column.float()

    def advance(self, step: int) -> Tensor:
        """Makes step ``step`` (from 0) and the topology updates that follow it; returns the losses (E,)."""
        losses, grads = self._gradients(self._batch(step))
        device, factor = self.shape.device, schedule(self.cases[0], step)
        now = (torch.tensor(float(step + 1), device=device), torch.tensor(factor, device=device))
        with torch.no_grad():
            masked, plain = ([grads[name] for name in parts] for parts in (self._masked, self._plain))
            self._step_masked(list(self._masked.values()), masked, self._aging, *now)
            self._step_plain(list(self._plain.values()), plain, self._plain_rates, *now)
            for index, case in enumerate(self.cases):
                self._sum_gradients(index, case, step, grads)
                if case.next_update(step) == step + 1:
                    self._update(index, step + 1)
        return losses

    def _batch(self, step: int) -> Tensor:
        batches = {seed: corpus.batch(step, self.shape.batch) for seed, corpus in self._corpora.items()}
        return torch.stack([batches[case.seed] for case in self.cases]).to(self.shape.device)

    def _gradients(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weights = [part.weight.requires_grad_() for part in self.parts.values()]
        losses = self._losses(weights, tokens)
        grads = torch.autograd.grad(losses.sum(), weights)
        return losses.detach(), dict(zip(self.parts, grads, strict=True))

    def _sum_gradients(self, index: int, case: Replica, step: int, grads: dict[str, Tensor]) -> None:
        """Adds up the dense gradients of a replica in the last steps before an update that reads them."""
        upcoming = case.next_update(step)
        if not case.needs_gradients or upcoming is None or upcoming - (step + 1) >= case.window:
            return
        decay = _MOMENTUM if case.grow == "momentum" else 1.0
        for name in self.topologies[index]:
            grad, before = grads[name][index], self._summed.get((index, name))
            self._summed[index, name] = grad.clone() if before is None else decay * before + grad

    def _update(self, index: int, step: int) -> None:
        for name, topology in self.topologies[index].items():
            part, summed = self._masked[name], self._summed.pop((index, name), None)
            weight, first = part.weight[index].cpu(), part.first[index].cpu()
            reading = Reading(weight, first, None if summed is None else summed.cpu())
            changed = topology.update(step, reading, self.movements[index])
            spread = topology.grid.spread
            part.mask[index].copy_(spread(topology.active))
            part.births[index].copy_(spread(topology.births))
            for rows in (part.weight, part.first, part.second):
                rows[index].masked_fill_(spread(changed).to(rows.device), 0.0)

    @torch.no_grad()
    def held_out(self) -> list[float]:
        """Returns the loss of every replica per byte of the held-out windows, as `held_out_loss` does."""
        windows = next(iter(self._corpora.values())).held_out(FINAL_WINDOWS).to(self.shape.device)
        weights = [part.weight for part in self.parts.values()]
        total = torch.zeros(len(self.cases), dtype=torch.float64, device=self.shape.device)
        for part in windows.split(_WINDOWS_AT_ONCE):
            total += self._losses(weights, part.expand(len(self.cases), *part.shape).contiguous()).double() * len(part)
        return (total / len(windows)).tolist()

    def finish(self) -> None:
        for movement, topologies in zip(self.movements, self.topologies, strict=True):
            for topology in topologies.values():
                topology.finish(movement)


def _fresh(kind: Callable[..., Any], weight: Tensor, *rest: Tensor) -> Any:
    return kind(weight, torch.zeros_like(weight), torch.zeros_like(weight), *rest)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def train_together(cases: Sequence[Replica], eager: bool = False) -> list[dict]:
    """Trains replicas of one shape and length, and returns their records. ``eager``: without the compiler.

    A replica whose loss is not finite at the end has the loss None.
    """
    torch._dynamo.reset()
    began, replicas = time.perf_counter(), Replicas(cases, eager)
    losses = torch.stack([_reported(replicas, step) for step in range(cases[0].steps)]).T.tolist()
    replicas.finish()
    held_out, text = replicas.held_out(), corpus_of(cases[0]).describe()
    seconds = (time.perf_counter() - began) / len(cases)
    return [
        {
            "key": case.key,
            "case": asdict(case),
            "loss": held_out[index] if math.isfinite(losses[index][-1]) else None,
            "train": _means(losses[index], max(1, case.steps // _NUM_MEANS)),
            "density": _density(replicas.topologies[index]),
            "text": text,
            "movement": asdict(replicas.movements[index]),
            "seconds": round(seconds, 1),
            "torch": torch.__version__,
            "processor": processor(),
        }
        for index, case in enumerate(cases)
    ]


def _reported(replicas: Replicas, step: int) -> Tensor:
    """Makes a step; prints the number of steps and the processor's time now and then, since a batch takes minutes."""
    losses = replicas.advance(step)
    num_steps = replicas.cases[0].steps
    if (step + 1) % max(1, num_steps // _NUM_REPORTS) == 0:
        now, used = time.strftime("%H:%M:%S"), time.process_time()
        print(f"{now} step {step + 1} of {num_steps}, {len(losses)} replicas, {used:.0f} s of processor", flush=True)
    return losses


def _means(losses: list[float], every: int) -> list[float]:
    return [round(sum(part) / len(part), 4) for part in (losses[i : i + every] for i in range(0, len(losses), every))]


def _density(topologies: dict[str, Topology]) -> float:
    """Returns the share of active blocks in the sparse weights; 1 where there is none."""
    active = sum(int(topology.active.sum()) for topology in topologies.values())
    return active / sum(topology.active.numel() for topology in topologies.values()) if topologies else 1.0
