"""Lightning's Trainer trains sparse with one callback: steps, logs, saves, resumes bit for bit, exports."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.ranks import processes

pl = pytest.importorskip("lightning.pytorch")
environments = pytest.importorskip("lightning.pytorch.plugins.environments")
SparseTraining = pytest.importorskip("smet_compile.integrations.lightning").SparseTraining

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*num_workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*Starting from v1.9.0, `tensorboardX`"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]
processes.preload(["smet_compile.integrations.lightning"])
CHOICES = {"every": 2, "grow": "gradient", "stop_fraction": 1.0, "min_age": 0}
BATCHES, EPOCHS = 6, 2


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4 * BATCHES, size, generator=generator) for size in (12, 7))
    return DataLoader(TensorDataset(x, y), batch_size=4)


class Net(pl.LightningModule):
    def __init__(self, optimizer: str = "active") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20), nn.Tanh(), nn.Linear(20, 7))
        self.kind = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss: Tensor = (self.layers(x.to(self.dtype)) - y.to(self.dtype)).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        if self.kind == "active":
            return smet.ActiveAdamW(self, lr=1e-2)
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class TwoOptimizers(Net):
    """Steps one optimizer in each batch, and the other in every ``period``-th, by hand."""

    def __init__(self, period: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.period = period

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        optimizers[0].step()
        if batch_idx % self.period == 0:
            optimizers[1].step()

    def configure_optimizers(self) -> Any:
        first, second = self.layers[0].parameters(), [*self.layers[1].parameters(), *self.layers[3].parameters()]
        return [torch.optim.AdamW(first, lr=1e-2), torch.optim.SGD(second, lr=1e-2)]


def trainer_in(folder: Path, *callbacks: Any, **options: Any) -> Any:
    settings = {"accelerator": "cpu", "devices": 1, "max_epochs": EPOCHS, "log_every_n_steps": 1, "logger": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **(settings | options))


def saver(folder: Path) -> Any:
    return pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)


def same_states(model: nn.Module, other: nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["active", "torch"])
def test_it_resumes_bit_for_bit(options: dict[str, Any], optimizer: str, tmp_path: Path) -> None:
    whole, callback = Net(optimizer), SparseTraining(0.3, **CHOICES)
    trainer = trainer_in(tmp_path, callback, saver(tmp_path), enable_checkpointing=True, **options)
    trainer.fit(whole, loader())
    accumulated = options.get("accumulate_grad_batches", 1)
    steps = EPOCHS * -(-BATCHES // accumulated)
    assert callback.manager.num_steps == steps == callback.manager.settings["total_steps"]
    assert [event.step for event in callback.manager.history] == list(range(2, steps, 2))
    resumed, again = Net(optimizer), SparseTraining(0.3, **CHOICES)
    trainer_in(tmp_path, again, **options).fit(resumed, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert again.manager.history == callback.manager.history and again.manager.num_steps == steps
    assert same_states(resumed, whole)
    assert whole.dtype == (torch.bfloat16 if options.get("precision") == "bf16-true" else torch.float32)


def test_it_is_the_run_that_a_loop_makes(tmp_path: Path) -> None:
    module, callback = Net(), SparseTraining(0.3, seed=3, **CHOICES)
    trainer_in(tmp_path, callback).fit(module, loader())
    plain = Net()
    smet.sparsify(plain, 0.3, seed=3)
    optimizer = plain.configure_optimizers()
    manager = smet.TopologyManager(plain, optimizer, total_steps=EPOCHS * BATCHES, seed=3, **CHOICES)
    for _ in range(EPOCHS):
        for x, y in loader():
            optimizer.zero_grad()
            (plain.layers(x) - y).square().mean().backward()
            optimizer.step()
            manager.step()
    assert same_states(module, plain)


def test_numbers_are_logged_and_the_dense_module_is_written(tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(tmp_path)
    module, callback = Net(), SparseTraining(0.3, export=tmp_path / "out" / "dense.pt", **CHOICES)
    trainer_in(tmp_path, callback, logger=logger, log_every_n_steps=2).fit(module, loader(), loader())
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    logged = [row for row in rows if row["smet/density"]]
    assert [float(row["smet/steps"]) for row in logged] == [2, 4, 6, 8, 10, 12]
    assert [float(row["smet/updates"]) for row in logged] == [1, 2, 3, 4, 5, 5]
    assert all(float(row["smet/density"]) == pytest.approx(0.3, abs=0.01) and row["loss"] for row in logged)
    assert float(logged[0]["smet/churn_fraction"]) > 0
    dense = Net()
    dense.load_state_dict(torch.load(tmp_path / "out" / "dense.pt"))
    x = next(iter(loader()))[0]
    torch.testing.assert_close(dense.layers(x), module.layers(x), rtol=1e-5, atol=1e-6)
    assert same_states(dense, smet.export_dense(module))


@pytest.mark.parametrize("period", [1, 2])
def test_several_optimizers_by_hand(period: int, tmp_path: Path) -> None:
    """The manager counts the steps of the optimizer that makes most of them, and the weights of both move."""
    module, callback = TwoOptimizers(period), SparseTraining(0.3, **{**CHOICES, "grow": "random"})
    trainer = trainer_in(tmp_path, callback, saver(tmp_path), enable_checkpointing=True)
    trainer.fit(module, loader())
    assert callback.manager.num_steps == EPOCHS * BATCHES
    assert [event.step for event in callback.manager.history] == [2, 4, 6, 8, 10]
    assert all(set(event.sites) == {"layers.0.weight", "layers.3.weight"} for event in callback.manager.history)
    resumed, again = TwoOptimizers(period), SparseTraining(0.3, **{**CHOICES, "grow": "random"})
    trainer_in(tmp_path, again).fit(resumed, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same_states(resumed, module)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_it_resumes_in_any_density_stage(epoch: int, tmp_path: Path) -> None:
    def callback() -> Any:
        stages = [(4, 0.5), (10, 0.3)]
        return SparseTraining(1.0, dense_as_compact=True, every=2, density_schedule=stages, stop_fraction=1.0)

    whole, sparse = Net(), callback()
    trainer_in(tmp_path, sparse, saver(tmp_path), enable_checkpointing=True, max_epochs=3).fit(whole, loader())
    resumed, again = Net(), callback()
    path = tmp_path / f"epoch={epoch}.ckpt"
    trainer_in(tmp_path, again, max_epochs=3).fit(resumed, loader(), ckpt_path=path)
    assert again.manager.history == sparse.manager.history and same_states(resumed, whole)
    trainer_in(tmp_path, again, max_epochs=3).fit(resumed, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert again.manager.history == sparse.manager.history and same_states(resumed, whole)


def test_a_refused_checkpoint_is_forgotten(tmp_path: Path) -> None:
    trainer_in(tmp_path, SparseTraining(0.3, **CHOICES), saver(tmp_path), enable_checkpointing=True).fit(
        Net(), loader()
    )
    callback = SparseTraining(0.3, **{**CHOICES, "every": 3})
    with pytest.raises(ValueError, match="every: expected 3 as in this manager"):
        trainer_in(tmp_path, callback).fit(Net(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    trainer_in(tmp_path, callback).fit(Net(), loader())
    assert callback.manager.num_steps == EPOCHS * BATCHES


def test_a_checkpoint_that_is_evaluated_is_not_gone_on_with(tmp_path: Path) -> None:
    trainer_in(tmp_path, SparseTraining(0.3, **CHOICES), saver(tmp_path), enable_checkpointing=True).fit(
        Net(), loader()
    )
    callback, module = SparseTraining(0.3, **CHOICES), Net()
    trainer = trainer_in(tmp_path, callback)
    trainer.validate(Net(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    trainer.fit(module, loader())
    assert callback.manager.num_steps == EPOCHS * BATCHES
    assert [event.step for event in callback.manager.history] == [2, 4, 6, 8, 10]


def test_a_checkpoint_is_evaluated(tmp_path: Path) -> None:
    module = Net()
    trainer = trainer_in(tmp_path, SparseTraining(0.3), saver(tmp_path), enable_checkpointing=True)
    trainer.fit(module, loader())
    (expected,) = trainer.validate(module, loader(), verbose=False)
    other = trainer_in(tmp_path, SparseTraining(0.3))
    (got,) = other.validate(Net(), loader(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert got == expected


def test_a_sparse_module_and_layers_of_configure_model(tmp_path: Path) -> None:
    sparse = smet.sparsify(Net(), 0.5)
    callback = SparseTraining(every=3)
    trainer_in(tmp_path, callback).fit(sparse, loader())
    assert callback.manager.sites["layers.0.weight"].density == 0.5

    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.made, self.layers = self.layers, None

        def configure_model(self) -> None:
            self.layers = self.made if self.layers is None else self.layers

    callback = SparseTraining(0.3, **CHOICES)
    module = Late()
    trainer_in(tmp_path, callback, precision="bf16-true").fit(module, loader())
    assert find_sites(module) and len(callback.manager.history) == 5


def test_a_second_fit_goes_on_with_the_weights(tmp_path: Path) -> None:
    module, callback = Net(), SparseTraining(0.3, **CHOICES)
    trainer = trainer_in(tmp_path, callback)
    trainer.fit(module, loader())
    trainer.fit_loop.max_epochs = 2 * EPOCHS
    with pytest.warns(UserWarning, match="the trainer has made 12 steps, got none"):
        trainer.fit(module, loader())
    assert callback.manager.num_steps == EPOCHS * BATCHES


class SetUpLate(Net):
    def setup(self, stage: str) -> None:
        self.late = nn.Linear(7, 7)


class Iterable(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([torch.zeros(12)])


@pytest.mark.parametrize(
    ("module", "arguments", "options", "message"),
    [
        (Net, {"density": 0.3, "evry": 3}, {}, "evry: expected an option of sparsify or TopologyManager, got another"),
        (Net, {}, {}, "density: expected the active share, such as 0.3, got None"),
        (lambda: smet.sparsify(Net(), 0.3), {"density": 0.3}, {}, "density: expected None for a module that is sparse"),
        (lambda: smet.sparsify(Net(), 0.3), {"exclude": "x"}, {}, "exclude: expected no option of sparsify"),
        (SetUpLate, {"density": 0.3}, {}, "late.weight: expected the layers that the module had before its setup"),
        (Net, {"density": 0.3}, {"max_epochs": -1}, "total_steps: expected a number for a run without a length"),
    ],
)
def test_mistakes_are_named(module: Any, arguments: Any, options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer_in(tmp_path, SparseTraining(**arguments), **options).fit(module(), loader())


@pytest.mark.parametrize(
    ("name", "value"), [("grow", "gradients"), ("every", 0), ("drop_fraction", 1.0), ("min_age", -1)]
)
def test_a_wrong_value_is_refused_before_there_is_a_module(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        SparseTraining(0.3, **{name: value})


@pytest.mark.parametrize("name", ["WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"])
def test_averages_of_weights_are_refused_by_name(name: str, tmp_path: Path) -> None:
    averaging = getattr(pl.callbacks, name)(**({"swa_lrs": 1e-2} if name.startswith("S") else {}))
    with pytest.raises(ValueError, match=f"expected none that averages weights, got {name}"):
        trainer_in(tmp_path, averaging, SparseTraining(0.3)).fit(Net(), loader())


def test_pruning_is_refused_by_name(tmp_path: Path) -> None:
    pruning = pl.callbacks.ModelPruning("l1_unstructured", amount=0.5)
    with pytest.raises(ValueError, match="expected none that prunes, got ModelPruning, which finds no compact weight"):
        trainer_in(tmp_path, pruning, SparseTraining(0.3)).fit(Net(), loader())


def test_strategies_that_make_parameters_anew_are_refused(tmp_path: Path) -> None:
    """FSDP's strategy needs a GPU to be chosen by name, so the trainer is given one."""
    trainer = trainer_in(tmp_path)
    trainer._accelerator_connector.strategy = pl.strategies.FSDPStrategy()
    with pytest.raises(ValueError, match="expected one device or DistributedDataParallel, got FSDPStrategy"):
        SparseTraining(0.3).setup(trainer, Net(), "fit")


def test_other_settings_are_refused_unless_asked_for(tmp_path: Path) -> None:
    first = trainer_in(tmp_path, SparseTraining(0.3, **CHOICES), saver(tmp_path), enable_checkpointing=True)
    first.fit(Net(), loader())
    path = tmp_path / "epoch=0.ckpt"
    with pytest.raises(ValueError, match="every: expected 3 as in this manager, got 2 in the saved run"):
        trainer_in(tmp_path, SparseTraining(0.3, **{**CHOICES, "every": 3})).fit(Net(), loader(), ckpt_path=path)
    callback = SparseTraining(0.3, override=["total_steps"], **CHOICES)
    trainer_in(tmp_path, callback, max_epochs=3).fit(Net(), loader(), ckpt_path=path)
    assert callback.manager.num_steps == 3 * BATCHES == callback.manager.settings["total_steps"]


class Processes(environments.ClusterEnvironment):
    """Tells Lightning of the processes of a test."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self._rank, self._world = rank, world

    creates_processes_externally = True
    main_address, main_port = "127.0.0.1", 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._world

    def set_world_size(self, size: int) -> None:
        assert size == self._world

    def global_rank(self) -> int:
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        assert rank == self._rank

    def local_rank(self) -> int:
        return self._rank

    def node_rank(self) -> int:
        return 0


def train_in_parallel(rank: int, world: int, folder: Path) -> Any:
    """Trains on this rank's half of each batch, then resumes from the first epoch; returns what came of both."""
    ended = []
    for resume in (False, True):
        strategy = pl.strategies.DDPStrategy(cluster_environment=Processes(rank, world), process_group_backend="gloo")
        callback, module = SparseTraining(0.3, **CHOICES), Net()
        options = {
            "strategy": strategy,
            "devices": world,
            "enable_checkpointing": True,
            "use_distributed_sampler": False,
        }
        trainer = trainer_in(folder, callback, saver(folder / str(resume)), **options)
        rows = loader().dataset
        mine = DataLoader(rows, batch_size=4, sampler=DistributedSampler(rows, world, rank, shuffle=False))
        trainer.fit(module, mine, ckpt_path=folder / "False" / "epoch=0.ckpt" if resume else None)
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        ended.append((state, [event.step for event in callback.manager.history]))
    return ended


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """Rank r has every second row from r on, so that two ranks with 4 rows make the steps of one with 8."""
    ranks = processes.run(2, train_in_parallel, tmp_path)
    alone = Net()
    half = SparseTraining(0.3, **CHOICES)
    trainer_in(tmp_path, half).fit(alone, DataLoader(loader().dataset, batch_size=8))
    for (state, steps), (resumed, again) in ranks:
        assert steps == again == [event.step for event in half.manager.history] == [2, 4]
        for name, tensor in alone.state_dict().items():
            assert torch.equal(resumed[name], state[name]), name
            assert torch.equal(state[name], ranks[0][0][0][name]), name
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-6)
