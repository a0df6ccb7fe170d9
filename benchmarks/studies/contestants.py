"""Names what a user short of memory could train instead, and finds for each the largest model that fits a budget.

A budget is the number of bytes that a dense model of a given width needs with AdamW in fp32. Bytes are counted from
tensors: all that lives between backward and the optimizer's step and is not an activation, after one step of the real
model with the real optimizer. Models differ in width alone.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measuring import peak_allocated, storages
from benchmarks.studies.case import Case, Shape
from benchmarks.studies.optimizers import is_installed
from benchmarks.studies.scale import Scale
from benchmarks.studies.settings import PLAIN_RATE, rate_of
from benchmarks.studies.trainer import build, two_calls

MODELS = "equal_memory_models.json"
PROTECTED = {"every": 100, "block_warmup": 100, "min_age": 200}
_BF16 = {"dtype": "bfloat16", "moment_dtype": "bfloat16"}
_STATIC = {"every": 0}
CONTESTANTS: dict[str, dict[str, Any]] = {
    "dense, AdamW, fp32": {},
    "dense, AdamW, bf16": _BF16 | {"optimizer": "torchao"},
    "dense, 8-bit AdamW, bf16": _BF16 | {"optimizer": "torchao_8bit"},
    "dense, GaLore, bf16": _BF16 | {"optimizer": "galore"},
    "dense, APOLLO, bf16": _BF16 | {"optimizer": "apollo"},
    "dense, APOLLO-Mini, bf16": _BF16 | {"optimizer": "apollo_mini"},
    "dense, SCALE, bf16": _BF16 | {"optimizer": "scale"},
    "d 0.25, AdamW, fp32": PROTECTED | {"density": 0.25},
    "d 0.5, AdamW, bf16": PROTECTED | _BF16 | {"density": 0.5},
    "d 0.25, AdamW, bf16": PROTECTED | _BF16 | {"density": 0.25},
    "d 0.1, AdamW, bf16": PROTECTED | _BF16 | {"density": 0.1},
    "d 0.25, 8-bit AdamW, bf16": PROTECTED | _BF16 | {"density": 0.25, "moment_dtype": "int8"},
    "d 0.5, SCALE, bf16": _STATIC | _BF16 | {"density": 0.5, "optimizer": "scale"},
    "d 0.25, SCALE, bf16": _STATIC | _BF16 | {"density": 0.25, "optimizer": "scale"},
}
REFERENCE = "dense, AdamW, fp32"
_WIDTH_STEP = 8  # four heads of an even size
_WIDTH_STEP_OF_CODES = 16  # torchao's codes come in groups of 256
_COUNTED_TOKENS = 8
MICRO_BATCHES = (1, 8)


@dataclass(frozen=True)
class Fitted:
    """Holds the largest model of a contestant within a budget.

    ``bytes``: by kind, of weights, gradients, and the rest: states, index, ages.
    """

    name: str
    budget: int
    shape: Shape
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def shape_of(scale: Scale, hidden: int) -> Shape:
    return replace(scale.memory, hidden=hidden, intermediate=5 * hidden // 2)


class Factors(NamedTuple):
    """Holds the factors of the two peak rates.

    Args:
        linear: of the rule .106 / (d · width), for linear layers. plain: of .004, for all other parameters.
    """

    linear: float
    plain: float


UNCHANGED = Factors(1.0, 1.0)


def case_of(shape: Shape, name: str, steps: int, factors: Factors = UNCHANGED, seed: int = 0) -> Case:
    """Returns a run of a contestant."""
    rate, plain = factors.linear * rate_of(shape), factors.plain * PLAIN_RATE
    return Case(shape=shape, steps=steps, rate=rate, plain_rate=plain, seed=seed, **CONTESTANTS[name])


def training_bytes(case: Case) -> dict[str, int]:
    """Counts the bytes of weights, gradients, and all else that stays: states, projections, index, ages.

    Left out is the record of a topology's past, which lies in the memory of the host.
    """
    before, trainee = _alive(), build(case)
    trainee.manager = None
    tokens = torch.zeros(1, _COUNTED_TOKENS, dtype=torch.int64, device=case.shape.device)
    with torch.compiler.set_stance("force_eager"):
        two_calls(trainee.model, trainee.optimizer)({"input_ids": tokens, "labels": tokens})
        trainee.model(input_ids=tokens, labels=tokens).loss.backward()
    held = list(trainee.model.parameters())
    weights, gradients = _bytes(held), _bytes([p.grad for p in held if p.grad is not None])
    total = _alive() - before - tokens.untyped_storage().nbytes()
    return {"weights": weights, "gradients": gradients, "states and index": total - weights - gradients}


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _alive() -> int:
    gc.collect()
    return sum(storage.nbytes() for storage in storages())


def step_peak(case: Case, batch: int, checkpointed: bool) -> int:
    """Returns the most bytes that tensors hold in the third eager step at this batch size, by torch's allocator."""
    before, trainee = _alive(), build(replace(case, shape=replace(case.shape, batch=batch)))
    trainee.manager = None
    if checkpointed:
        trainee.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trainee.model.train()
    tokens = torch.zeros(batch, case.shape.sequence, dtype=torch.int64, device=case.shape.device)
    step = two_calls(trainee.model, trainee.optimizer)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(2):
            step({"input_ids": tokens, "labels": tokens})
        return peak_allocated(lambda: step({"input_ids": tokens, "labels": tokens})) - before


def peaks(rival: Fitted) -> dict[str, int]:
    """Returns the most bytes that tensors hold in a step of the model, by micro-batch and checkpointing."""
    case = case_of(rival.shape, rival.name, 1)
    return {
        f"{batch}{', checkpointed' if checkpointed else ''}": step_peak(case, batch, checkpointed)
        for checkpointed in (False, True)
        for batch in MICRO_BATCHES
    }


def fit(scale: Scale, folder: Path, names: dict[int, Sequence[str]]) -> None:
    """Finds the largest models of the named contestants by budget, and keeps them on disk."""
    path = folder / MODELS
    found = read(path)
    known = {(each.budget, each.name) for each in found}
    for budget, its_names in names.items():
        limit = sum(training_bytes(case_of(shape_of(scale, budget), REFERENCE, 1)).values())
        for name in its_names:
            if (budget, name) in known:
                continue
            if not is_installed(CONTESTANTS[name].get("optimizer", "adamw")):
                print(f"{name}: left out, its package is not installed", flush=True)
                continue
            found.append(_largest(scale, budget, limit, name))
            print(f"{name}: width {found[-1].shape.hidden}, {found[-1].total / 1e6:.2f} MB", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")


def read(path: Path) -> list[Fitted]:
    """Reads what `fit` kept; nothing where it kept nothing yet."""
    saved = json.loads(path.read_text()) if path.exists() else []
    return [Fitted(**(each | {"shape": Shape(**each["shape"])})) for each in saved]


def _largest(scale: Scale, budget: int, limit: int, name: str) -> Fitted:
    """Finds the widest model within the limit by bisection, since bytes grow with the width."""
    unit = _WIDTH_STEP_OF_CODES if CONTESTANTS[name].get("optimizer") == "torchao_8bit" else _WIDTH_STEP

    def count(steps: int) -> dict[str, int]:
        return training_bytes(case_of(shape_of(scale, steps * unit), name, 1))

    low, high = 1, scale.widest // unit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(count(middle).values()) <= limit else (low, middle)
    return Fitted(name, budget, shape_of(scale, low * unit), count(low))
