"""Hugging Face's Trainer trains sparse after one line: steps, logs, resumes bit for bit; mistakes are named."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import smet_compile as smet
from smet_compile.integrations.transformers import SmetCallback, sparse_training
from smet_compile.ops import find_sites
from tests.integrations.language import ROWS, Listener, arguments_in, llama, trainer_in
from tests.support.snapshots import same_bits


def sparse(trainer: Trainer, density: float | None = 0.3, **options: Any) -> SmetCallback:
    return sparse_training(trainer, density, **{"every": 4, "warmup_steps": 3, "grow": "gradient", **options})


def assert_same_model(trainer: Trainer, other: Trainer) -> None:
    for name, tensor in trainer.model.state_dict().items():
        assert same_bits(tensor, other.model.state_dict()[name]), name


VARIANTS = [
    {},
    {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
    {"bf16": True, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    {"activation_checkpointing": True},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_it_steps_logs_and_resumes_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    whole = trainer_in(tmp_path, **options)
    callback = sparse(whole)
    whole.train()
    assert [event.step for event in callback.manager.history] == [4, 8]
    resumed = trainer_in(tmp_path, **options)
    again = sparse(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.manager.history == callback.manager.history
    assert_same_model(whole, resumed)
    (listener,) = (each for each in whole.callback_handler.callbacks if isinstance(each, Listener))
    numbers = [logs for logs in listener.logs if "loss" in logs]
    assert [each["smet/updates"] for each in numbers] == [0, 1, 1, 2, 2, 2]
    assert all(each["smet/density"] == pytest.approx(0.3, abs=0.01) for each in numbers)
    assert numbers[-1]["smet/churn_fraction"] > 0 and numbers[-1]["smet/skipped_blocks"] == 0
    assert whole.state.log_history[0]["smet/steps"] == 2


@pytest.mark.parametrize("density", [1.0, None])
def test_density_one_is_the_dense_baseline(density: float | None, tmp_path: Path) -> None:
    def run(checkpoint: Path | None = None) -> Trainer:
        trainer = trainer_in(tmp_path, max_steps=8)
        if density is None:
            smet.sparsify(trainer.model, 1.0)
        sparse_training(trainer, density, every=2, export=tmp_path / "dense")
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = run()
    numbers = whole.state.log_history[-2]
    assert numbers["smet/density"] == 1 and numbers["smet/steps"] == 8 and numbers["smet/compact_bytes"] == 0
    assert_same_model(whole, run(tmp_path / "checkpoint-4"))


def test_compact_bytes_are_those_of_the_tensors(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, max_steps=1, save_steps=10)
    callback = sparse(trainer)
    trainer.train()
    sites, state = find_sites(trainer.model).values(), callback.manager.optimizer.state
    expected = sum(
        site.values.nbytes + site.compact.topology.nbytes + sum(each.nbytes for each in state[site.values].values())
        for site in sites
    )
    numbers = callback.manager.metrics()
    assert numbers["compact_bytes"] == expected > 3 * 4 * sum(site.num_active for site in sites)
    assert callback.manager.metrics("a/") == {f"a/{name}": value for name, value in numbers.items()}


@pytest.mark.slow
def test_a_compiled_model_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer_in(tmp_path, torch_compile=True)
    sparse(whole)
    whole.train()
    resumed = trainer_in(tmp_path, torch_compile=True)
    sparse(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_same_model(whole, resumed)


@pytest.mark.filterwarnings("ignore:TopologyManager")
def test_epochs_make_the_length_of_the_run(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, max_steps=-1, num_train_epochs=1.5, gradient_accumulation_steps=3)
    callback = sparse(trainer, every=2)
    trainer.train()
    assert callback.manager.settings["total_steps"] == trainer.state.max_steps == 9
    assert callback.manager.num_steps == 9


def test_biases_and_norms_do_not_decay(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    sparse(trainer)
    decaying, others = trainer.optimizer.param_groups
    norms = {id(p) for name, p in trainer.model.named_parameters() if "norm" in name}
    assert decaying["weight_decay"] == 0.1 and others["weight_decay"] == 0
    assert norms == {id(p) for p in others["params"]}
    assert {id(site.values) for site in find_sites(trainer.model).values()} <= {id(p) for p in decaying["params"]}


class WithBrokenLoss(Trainer):
    """Has a loss that is not a number in the fourth step, before which an update is due."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 else loss


def test_an_update_waits_for_a_finite_step(tmp_path: Path) -> None:
    trainer = WithBrokenLoss(llama(), arguments_in(tmp_path, max_steps=8), train_dataset=ROWS)
    callback = sparse(trainer)
    trainer.train()
    assert [event.step for event in callback.manager.history] == [5]
    assert callback.manager.metrics()["skipped_blocks"] > 0
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


ADAMW = {"lr": 2e-3, "betas": (0.8, 0.9)}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adagrad, {"lr": 1e-2, "initial_accumulator_value": 0.1}),
        (torch.optim.Rprop, {"lr": 1e-3}),
        (smet.ActiveLion, {"lr": 1e-3}),
        (smet.ActiveAdamW, ADAMW),
    ],
)
def test_the_trainer_names_another_optimizer(kind: Any, options: dict[str, Any], tmp_path: Path) -> None:
    def run(checkpoint: Path | None = None) -> tuple[Trainer, SmetCallback]:
        arguments = arguments_in(tmp_path, max_steps=8)
        trainer = Trainer(llama(), arguments, train_dataset=ROWS, optimizer_cls_and_kwargs=(kind, dict(options)))
        callback = sparse_training(trainer, 0.3, every=4)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, callback

    whole, callback = run()
    assert type(callback.manager.optimizer) is kind and len(callback.manager.history) == 1
    group = callback.manager.optimizer.param_groups[0]
    assert group["initial_lr"] == options["lr"] and group["weight_decay"] == 0.1
    resumed, _ = run(tmp_path / "checkpoint-4")
    assert_same_model(whole, resumed)


def test_the_model_comes_with_its_optimizer(tmp_path: Path) -> None:
    model = smet.sparsify(llama(), 0.3)
    optimizer = smet.ActiveAdamW(model, lr=1e-3)
    trainer = Trainer(model, arguments_in(tmp_path), train_dataset=ROWS, optimizers=(optimizer, None))
    callback = sparse_training(trainer, every=4, seed=1)
    trainer.train()
    assert callback.manager.optimizer is optimizer and callback.manager.num_steps == 12


def test_without_a_manager_the_trainer_makes_active_optimizers_of_the_model(tmp_path: Path) -> None:
    model = smet.sparsify(llama(), 0.3)
    own = (smet.ActiveAdamW, {"model": model, "lr": 1e-3})
    trainer = Trainer(model, arguments_in(tmp_path, max_steps=2), train_dataset=ROWS, optimizer_cls_and_kwargs=own)
    trainer.train()
    assert {id(p) for p in trainer.optimizer.state} == {id(p) for p in model.parameters()}


def test_a_file_without_the_manager_is_told(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    sparse(trainer)
    state = trainer.optimizer.state_dict()
    del state["param_groups"][0]["topology_manager"]
    with pytest.warns(UserWarning, match="expected its state in that of the optimizer, got none"):
        trainer.optimizer.load_state_dict(state)


def test_a_run_that_begins_elsewhere_is_told(tmp_path: Path) -> None:
    first = trainer_in(tmp_path, max_steps=4, save_only_model=True)
    sparse(first)
    first.train()
    with pytest.warns(UserWarning, match="begin at the same step, got step 0 and step 4"):
        first.train()
    resumed = trainer_in(tmp_path, max_steps=6)
    sparse(resumed)
    with pytest.warns(UserWarning, match="begin at the same step, got step 4 and step 0"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_another_length_is_told(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, max_steps=1)
    sparse(trainer, total_steps=20)
    with pytest.warns(UserWarning, match="expected a run of total_steps=20, got one of 1"):
        trainer.train()


def test_other_settings_are_refused(tmp_path: Path) -> None:
    first = trainer_in(tmp_path)
    sparse(first)
    other = trainer_in(tmp_path)
    sparse(other, every=5)
    with pytest.raises(ValueError, match="every"):
        other.optimizer.load_state_dict(first.optimizer.state_dict())


def with_optimizer(trainer: Trainer) -> None:
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 0.1)


def with_sparse_model(trainer: Trainer) -> None:
    smet.sparsify(trainer.model, 0.5)


def with_model_init(trainer: Trainer) -> None:
    trainer.model_init = llama


def with_adafactor(trainer: Trainer) -> None:
    trainer.args.optim = "adafactor"


def with_wrong_options(trainer: Trainer) -> None:
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.1, "momentumm": 0.9})


def sparse_before(trainer: Trainer) -> None:
    sparse(trainer)


def frozen(trainer: Trainer) -> None:
    smet.sparsify(trainer.model, 0.5)
    for site in find_sites(trainer.model).values():
        site.values.requires_grad_(False)


def with_own_optimizer(trainer: Trainer) -> None:
    class Own(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            return torch.optim.SGD(self.model.parameters(), 0.1)

    trainer.__class__ = Own


def with_plain_model(trainer: Trainer) -> None:
    trainer.model = torch.nn.Sequential(torch.nn.Linear(8, 8))


def with_endless_data(trainer: Trainer) -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from ROWS

    trainer.train_dataset, trainer.args.max_steps = Endless(), -1


@pytest.mark.parametrize(
    ("change", "density", "options", "message"),
    [
        (with_optimizer, 0.3, {}, "trainer: expected one without an optimizer, got SGD of dense weights"),
        (with_sparse_model, 0.3, {}, "density: expected None for a model that is sparse already, got 0.3"),
        (None, None, {}, "density: expected the active share, such as 0.3, got None"),
        (None, 0.3, {"evry": 5}, "evry: expected an option of sparsify, TopologyManager or ActiveAdamW"),
        (None, 0.3, {"every": 0}, "every: expected"),
        (None, 0.3, {"drop": "magnitudes"}, "drop: expected"),
        (None, 0.3, {"block_shape": 0}, "block_shape: expected"),
        (with_wrong_options, 0.3, {}, "optimizer_cls_and_kwargs: expected options of SGD, got lr, momentumm"),
        (None, 0.6, {"drop_fraction": 0.9, "min_age": 0}, "a drop fraction of 0.9 needs"),
        (None, 0.3, {"density_schedule": [(5, 0.3)]}, "density_schedule: expected stages that change the model"),
        (None, 0.3, {"ablation_threshold": 0.3}, 'ablation_threshold: expected a weight with the pattern "fan_in"'),
        (None, 0.3, {"warmup_steps": -1}, "warmup_steps: expected"),
        (None, 0.3, {"moment_dtype": "int4"}, "moment_dtype: expected"),
        (with_sparse_model, None, {"exclude": "lm_head"}, "exclude: expected no option of sparsify for a sparse model"),
        (with_model_init, 0.3, {}, "trainer: expected one made with model=, got model_init="),
        (with_adafactor, 0.3, {}, "optim: expected AdamW without optim_args, got 'adafactor'"),
        (sparse_before, None, {}, "trainer: expected one that is not trained sparse yet, got a second call"),
        (frozen, None, {}, "trainer: expected a model whose compact weights are trained, got frozen ones"),
        (with_own_optimizer, 0.3, {}, "trainer: expected the create_optimizer of Trainer, got that of Own"),
        (with_plain_model, 0.3, {"export": "x"}, "export: expected a Hugging Face model, got Sequential"),
        (with_endless_data, 0.3, {}, "total_steps: expected a number for data without a length, got none"),
    ],
)
def test_mistakes_are_named(change: Any, density: Any, options: Any, message: str, tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    if change is not None:
        change(trainer)
    before, random = list(find_sites(trainer.model)), torch.get_rng_state()
    with pytest.raises(ValueError, match=re.escape(message)):
        sparse_training(trainer, density, **options)
    assert list(find_sites(trainer.model)) == before and torch.equal(torch.get_rng_state(), random)


def test_masks_say_where_weights_are_active(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, max_steps=2)
    name = "model.layers.0.mlp.up_proj.weight"
    mask = torch.rand(trainer.model.get_parameter(name).shape) < 0.3
    sparse_training(trainer, 0.3, masks={name: mask}, schedule="none")
    trainer.train()
    assert torch.equal(smet.masks(trainer.model)[name], mask)


def test_a_model_that_cannot_be_copied_becomes_sparse(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, max_steps=2)
    trainer.model.of_a_graph = torch.ones(1, requires_grad=True) * 2
    with pytest.raises(ValueError, match="every: expected"):
        sparse_training(trainer, 0.3, every=0)
    assert not find_sites(trainer.model)
    sparse_training(trainer, 0.3)
    trainer.train()
    assert find_sites(trainer.model)


def test_what_changes_afterwards_is_refused(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    sparse(trainer)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 0.1)
    with pytest.raises(ValueError, match="trainer: expected the optimizer of its topology manager, got another"):
        trainer.train()
    trainer = trainer_in(tmp_path)
    sparse(trainer)
    trainer.model = trainer.model_wrapped = llama()
    with pytest.raises(ValueError, match="trainer: expected the model that was made sparse, got another one"):
        trainer.train()


def test_the_callback_is_not_for_the_list_of_callbacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="SmetCallback: expected to be added by sparse_training, got callbacks="):
        Trainer(llama(), arguments_in(tmp_path), train_dataset=ROWS, callbacks=[SmetCallback(density=0.3)])
    trainer = trainer_in(tmp_path)
    trainer.add_callback(SmetCallback(density=0.3))
    with pytest.raises(ValueError, match="SmetCallback: expected to be added by sparse_training"):
        trainer.train()
