"""Altered files with a right checksum are refused whole, or hold a run that goes on."""

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from tests.support.altered_files import altered, read_file, write_file
from tests.support.snapshots import same_bits


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


KINDS: dict[str, tuple[Callable[[nn.Module], Any], torch.dtype, str]] = {
    "active": (lambda model: smet.ActiveAdamW(model, lr=1e-2, warmup_steps=3), torch.float32, "random"),
    "gradient": (lambda model: smet.ActiveAdamW(model, lr=1e-2, warmup_steps=3), torch.float32, "gradient"),
    "int8": (lambda model: smet.ActiveAdamW(model, lr=1e-2, moment_dtype="int8"), torch.float32, "random"),
    "bfloat16": (lambda model: smet.ActiveAdamW(model, lr=1e-2, warmup_steps=3), torch.bfloat16, "random"),
    "adamw": (adamw, torch.float32, "random"),
    "sgd": (sgd, torch.float32, "gradient"),
}


class Run:
    """A small model with three kinds of blocks, its optimizer and manager."""

    def __init__(self, kind: str, seed: int) -> None:
        make, dtype, grow = KINDS[kind]
        torch.manual_seed(seed)
        layers = nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 8), nn.BatchNorm1d(8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.model = nn.Sequential(*layers).to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # each call sees the weights of the others left dense
            for layer, block_shape in ((0, 1), (2, 4), (4, (1, 4))):
                smet.sparsify(self.model, 0.5, include=f"{layer}.weight", block_shape=block_shape)
        self.optimizer = make(self.model)
        self.manager = smet.TopologyManager(
            self.model, self.optimizer, total_steps=60, every=2, grow=grow, schedule="cosine"
        )
        self.objects = self.model, self.optimizer, self.manager

    def train(self, steps: int) -> None:
        for step in range(steps):
            x = torch.randn(8, 7, generator=torch.Generator().manual_seed(step))
            loss = self.model(x.to(self.model[0].bias.dtype)).square().mean() + torch.rand(())
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.manager.step()

    def content(self) -> list[Any]:
        """Everything that loading may change, as it lies in memory."""
        lists = [site.compact.lists for site in self.manager.sites.values()]
        grads = [p.grad for p in self.model.parameters()]
        flags = [(p.requires_grad, id(p)) for p in self.model.parameters()]
        states = [thing.state_dict() for thing in self.objects]
        return [states, lists, grads, flags, torch.get_rng_state()]


def frozen(tree: Any) -> Any:
    """A copy that later changes do not reach."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: frozen(value) for key, value in tree.items()}
    return type(tree)(map(frozen, tree)) if isinstance(tree, list | tuple) else tree


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return same_bits(a.detach(), b.detach())
    if type(a) is not type(b) and not (isinstance(a, dict) and isinstance(b, dict)):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def another(kind: str) -> tuple[Run, Any]:
    """A run to load into, and what is in memory."""
    run = Run(kind, 5)
    run.train(2)
    return run, frozen(run.content())


def try_files(folder: Path, kind: str, seeds: range) -> tuple[Counter[str], list[str]]:
    """Counts the altered files that were refused and taken, and lists what was wrong."""
    run = Run(kind, 0)
    run.train(7)
    smet.save_checkpoint(folder / "whole", *run.objects, extra={"step": 7, "x": torch.arange(3.0)})
    tensors, body = read_file(folder / "whole")
    fresh, before = another(kind)
    counts: Counter[str] = Counter()
    wrong = []
    for seed in seeds:
        what, new_tensors, new_body = altered(tensors, body, seed)
        write_file(folder / "altered", new_tensors, new_body)
        try:
            smet.load_checkpoint(folder / "altered", *fresh.objects)
            counts["taken"] += 1
        except ValueError:
            counts["refused"] += 1
            if not same(fresh.content(), before):
                wrong.append(f"{kind} {seed}: in part: {what}")
                fresh, before = another(kind)
            continue
        except Exception as error:
            wrong.append(f"{kind} {seed}: {type(error).__name__} {str(error)[:100]}: {what}")
            continue
        try:
            fresh.train(3)
        except Exception as error:
            wrong.append(f"{kind} {seed}: then {type(error).__name__} {str(error)[:100]}: {what}")
        fresh, before = another(kind)
    return counts, wrong


@pytest.mark.parametrize("kind", list(KINDS))
def test_some_altered_files(kind: str, tmp_path: Path) -> None:
    counts, wrong = try_files(tmp_path, kind, range(30))
    assert not wrong
    assert counts.total() == 30 and counts["refused"] > 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", list(KINDS))
def test_many_altered_files(kind: str, tmp_path: Path) -> None:
    counts, wrong = try_files(tmp_path, kind, range(1000, 1700))
    print(kind, dict(counts))
    assert not wrong
