"""Hugging Face's Trainer trains sparse after one line: steps, logs, saves, resumes bit for bit, exports."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import smet_compile as smet
from smet_compile.integrations.transformers import SparseTraining, sparse_training
from smet_compile.ops import find_sites

STEPS = 12
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64
}  # fmt: skip


class Listener(TrainerCallback):
    """Keeps what reporters are given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def trainer_in(folder: Path, **options: Any) -> Trainer:
    torch.manual_seed(0)
    tokens = torch.randint(64, (64, 16), generator=torch.Generator().manual_seed(0))
    settings = {"per_device_train_batch_size": 4, "save_steps": 4, "logging_steps": 2, "weight_decay": 0.1} | options
    settings.setdefault("max_steps", STEPS)
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=3e-3, **settings
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    return Trainer(LlamaForCausalLM(LlamaConfig(**SHAPE)), arguments, train_dataset=rows, callbacks=[Listener()])


def sparse(trainer: Trainer, **options: Any) -> SparseTraining:
    return sparse_training(trainer, 0.3, **{"every": 4, "warmup_steps": 3, "grow": "gradient", **options})


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}, {"bf16": True}, {"gradient_checkpointing": True}],
    ids=str,
)
def test_it_steps_logs_and_resumes_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    whole = trainer_in(tmp_path, **options)
    callback = sparse(whole, export=tmp_path / "dense")
    whole.train()
    assert callback.manager is not None and [event.step for event in callback.manager.history] == [4, 8]
    resumed = trainer_in(tmp_path, **options)
    again = sparse(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.manager is not None and again.manager.history == callback.manager.history
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    (listener,) = (each for each in whole.callback_handler.callbacks if isinstance(each, Listener))
    numbers = [logs for logs in listener.logs if "loss" in logs]
    assert [each["smet/updates"] for each in numbers] == [0, 1, 1, 2, 2, 2]
    assert all(each["smet/density"] == pytest.approx(0.3, abs=0.01) for each in numbers)
    assert numbers[-1]["smet/churn_fraction"] > 0 and numbers[-1]["smet/skipped_blocks"] == 0
    assert whole.state.log_history[0]["smet/steps"] == 2
    loaded, dense = LlamaForCausalLM.from_pretrained(tmp_path / "dense"), smet.export_dense(whole.model)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in dense.state_dict().items())


def test_epochs_make_the_length_of_the_run(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, max_steps=-1, num_train_epochs=1.5, gradient_accumulation_steps=3)
    callback = sparse(trainer, every=2)
    trainer.train()
    assert callback.manager is not None and callback.manager.settings["total_steps"] == trainer.state.max_steps == 9
    assert callback.manager.num_steps == 9


def test_biases_and_norms_do_not_decay(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    sparse(trainer)
    decaying, others = trainer.optimizer.param_groups
    norms = {id(p) for name, p in trainer.model.named_parameters() if "norm" in name}
    assert decaying["weight_decay"] == 0.1 and others["weight_decay"] == 0
    assert norms == {id(p) for p in others["params"]}
    assert {id(site.values) for site in find_sites(trainer.model).values()} <= {id(p) for p in decaying["params"]}


def test_a_file_without_the_manager_is_told(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    callback = sparse(trainer)
    state = trainer.optimizer.state_dict()
    del state["param_groups"][0]["topology_manager"]
    with pytest.warns(UserWarning, match="expected its state in that of the optimizer, got none"):
        trainer.optimizer.load_state_dict(state)
    assert callback.manager is not None


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


@pytest.mark.parametrize(
    ("change", "density", "options", "message"),
    [
        (with_optimizer, 0.3, {}, "trainer: expected one without an optimizer, got SGD"),
        (with_sparse_model, 0.3, {}, "density: expected None for a model that is sparse already, got 0.3"),
        (None, None, {}, "density: expected the active share, such as 0.3, got None"),
        (None, 0.3, {"evry": 5}, "evry: expected an option of sparsify, TopologyManager or ActiveAdamW"),
        (with_sparse_model, None, {"exclude": "lm_head"}, "exclude: expected no option of sparsify for a sparse model"),
    ],
)
def test_mistakes_are_named(change: Any, density: Any, options: Any, message: str, tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    if change is not None:
        change(trainer)
    with pytest.raises(ValueError, match=re.escape(message)):
        sparse_training(trainer, density, **options)
