"""Accelerate trains sparse without code of ours: prepare in any order, precision, accumulation, save_state, ranks."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.integrations.language import llama
from tests.integrations.worlds import forget_states, launched
from tests.support.ranks import processes
from tests.support.snapshots import same_bits

STEPS = 16
pytestmark = [pytest.mark.filterwarnings("ignore:TopologyManager"), pytest.mark.filterwarnings("ignore:sparsify")]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget_states()
    yield
    forget_states()


class Run:
    """Holds what a training script holds; each way to make it is one order of the lines of a script.

    Args:
        accelerator: what prepares.
    """

    model: Any
    optimizer: Any
    scheduler: Any
    loader: Any
    manager: smet.TopologyManager

    def __init__(self, accelerator: Accelerator) -> None:
        torch.manual_seed(0)
        self.accelerator = accelerator
        self.model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 1))
        x = torch.randn(8 * STEPS, 16, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(x, x[:, :1] * x[:, 1:2])
        self.loader = DataLoader(data, batch_size=8 // accelerator.num_processes)

    def sparsify(self) -> None:
        smet.sparsify(self.model, 0.3)

    def make_optimizer(self) -> None:
        self.optimizer = smet.ActiveAdamW(self.model, lr=1e-2, warmup_steps=3)
        length = 2 * STEPS * self.accelerator.num_processes  # accelerate steps a scheduler once for each process
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 - step / length)

    def manage(self, **options: Any) -> None:
        self.manager = smet.TopologyManager(self.model, self.optimizer, total_steps=STEPS, every=3, **options)

    def prepare(self, *names: str) -> None:
        prepared = self.accelerator.prepare(*(getattr(self, name) for name in names))
        self.__dict__.update(zip(names, prepared if len(names) > 1 else [prepared], strict=True))

    def train(self, first: int = 0, last: int = STEPS) -> list[float]:
        losses = []
        for place, (x, y) in enumerate(self.loader):
            if first <= place < last:
                with self.accelerator.accumulate(self.model):
                    loss = (self.model(x) - y).square().mean()
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                losses.append(float(self.accelerator.reduce(loss.detach(), "mean")))
        return losses

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.accelerator.unwrap_model(self.model).state_dict().items()}


ALL = ("model", "optimizer", "loader", "scheduler")


def prepared_last(run: Run) -> None:
    run.sparsify()
    run.make_optimizer()
    run.manage()
    run.prepare(*ALL)


def managed_last(run: Run) -> None:
    run.sparsify()
    run.make_optimizer()
    run.prepare(*reversed(ALL))
    run.manage()


def optimizer_last(run: Run) -> None:
    run.sparsify()
    run.prepare("model", "loader")
    run.make_optimizer()
    run.prepare("optimizer", "scheduler")
    run.manage()


def sparse_last(run: Run) -> None:
    run.prepare("loader", "model")
    run.sparsify()
    run.make_optimizer()
    run.manage()
    run.prepare("scheduler", "optimizer")


ORDERS: list[Callable[[Run], None]] = [prepared_last, managed_last, optimizer_last, sparse_last]


def by_hand() -> tuple[list[float], dict[str, Tensor], list[int]]:
    """Trains without accelerate."""
    run = Run(Accelerator(cpu=True))
    run.sparsify()
    run.make_optimizer()
    run.manage()
    losses = []
    for x, y in run.loader:
        loss = (run.model(x) - y).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
        losses.append(loss.item())
    return losses, run.state(), [event.step for event in run.manager.history]


@pytest.mark.parametrize("make", ORDERS)
def test_any_order_trains_as_a_plain_loop_does(make: Callable[[Run], None]) -> None:
    expected, state, updates = by_hand()
    forget_states()
    run = Run(Accelerator(cpu=True))
    make(run)
    assert run.train() == expected and updates == [3, 6, 9]
    assert [event.step for event in run.manager.history] == updates
    assert all(same_bits(tensor, state[name]) for name, tensor in run.state().items())


@pytest.mark.parametrize("make", ORDERS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_and_accumulation(make: Callable[[Run], None], precision: str) -> None:
    run = Run(Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2))
    make(run)
    run.train()
    assert run.manager.num_steps == STEPS // 2
    assert [event.step for event in run.manager.history] == [3, 6]
    assert all(site.values.dtype == torch.float32 for site in find_sites(run.model).values())


@pytest.mark.parametrize("stage", [2, 7, 12])
def test_a_saved_state_of_any_density_stage_goes_on(stage: int, tmp_path: Path) -> None:
    def make() -> Run:
        forget_states()
        run = Run(Accelerator(cpu=True))
        smet.sparsify(run.model, 1.0, dense_as_compact=True)
        run.make_optimizer()
        run.manage(density_schedule=[(5, 0.5), (10, 0.2)])
        run.prepare(*ALL)
        return run

    run = make()
    run.train(last=stage)
    run.accelerator.save_state(str(tmp_path))
    losses = run.train(first=stage)
    again = make()
    again.accelerator.load_state(str(tmp_path))
    assert again.train(first=stage) == losses
    assert again.manager.history == run.manager.history
    assert all(same_bits(tensor, run.state()[name]) for name, tensor in again.state().items())


def registered(run: Run) -> None:
    run.accelerator.register_for_checkpointing(run.manager)


def with_optimizer(run: Run) -> None:
    """Its state travels with the optimizer's, without a call."""


@pytest.mark.parametrize("keep", [registered, with_optimizer])
@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_a_saved_state_goes_on_bit_for_bit(keep: Callable[[Run], None], grow: str, tmp_path: Path) -> None:
    def make() -> Run:
        forget_states()
        run = Run(Accelerator(cpu=True, mixed_precision="bf16"))
        run.sparsify()
        run.make_optimizer()
        run.prepare(*ALL)
        run.manage(grow=grow, window=2)
        keep(run)
        return run

    whole = make()
    whole.train(last=5)
    whole.accelerator.save_state(str(tmp_path))
    expected = whole.train(first=5)
    resumed = make()
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.train(first=5) == expected
    assert resumed.manager.history == whole.manager.history and len(whole.manager.history) == 3
    assert all(same_bits(tensor, whole.state()[name]) for name, tensor in resumed.state().items())


def test_a_model_is_saved_as_the_documentation_of_accelerate_says(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(smet.sparsify(llama(), 0.3))
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    loaded, info = type(llama()).from_pretrained(tmp_path, output_loading_info=True)
    dense = smet.export_dense(model).state_dict()
    assert not any(info.values()) and all(torch.equal(dense[name], each) for name, each in loaded.state_dict().items())


def in_processes(rank: int, world: int, folder: Path) -> tuple[list[float], list[bool]]:
    with launched(rank, world):
        set_seed(0)
        run = Run(Accelerator(cpu=True))
        run.prepare("model")
        with pytest.raises(ValueError, match="sparsify: expected a model before it is wrapped, got DistributedDataPar"):
            run.sparsify()
        run = Run(Accelerator(cpu=True))
        prepared_last(run)
        registered(run)
        losses = run.train(last=5)
        run.accelerator.save_state(str(folder))
        losses += run.train(first=5)
        again = Run(Accelerator(cpu=True))
        managed_last(again)
        registered(again)
        again.accelerator.load_state(str(folder))
        again.train(first=5)
        of_ranks = [run.accelerator.gather(each[None]) for _, each in sorted(run.state().items())]
        alike = [bool((each == each[0]).all()) for each in of_ranks]
        return losses, [*alike, *(torch.equal(each, run.state()[name]) for name, each in again.state().items())]


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    expected, _, _ = by_hand()
    for losses, alike in processes.run(2, in_processes, tmp_path):
        assert losses == pytest.approx(expected, rel=1e-4)
        assert all(alike)
