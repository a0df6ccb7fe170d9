"""Tests Hugging Face's Trainer, unmodified: accumulation, clipping, activation checkpointing, autocast."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import smet_compile as smet


class ChangeTopology(TrainerCallback):
    def __init__(self, manager: smet.TopologyManager) -> None:
        self.manager = manager

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.manager.step()


class MakeManager(TrainerCallback):
    """Makes the manager of what the Trainer hands to callbacks: Accelerate's wrapper of an optimizer of its own."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **handed: Any) -> None:
        model, optimizer = handed["model"], handed["optimizer"]
        self.manager = smet.TopologyManager(model, optimizer, total_steps=state.max_steps, every=2)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.manager.step()


def test_a_manager_of_the_optimizer_that_the_trainer_makes(tmp_path: Path) -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    model = smet.sparsify(LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1)), density=0.3)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(64, (8, 16))]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    make = MakeManager()
    Trainer(model, arguments, train_dataset=rows, callbacks=[make]).train()
    assert make.manager.num_steps == 6 and [event.step for event in make.manager.history] == [2, 4]


@pytest.mark.parametrize(("grow", "bf16"), [("random", False), ("gradient", True)])
def test_the_trainer_trains(grow: str, bf16: bool, tmp_path: Path) -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    model = smet.sparsify(LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2)), density=0.3)
    optimizer = smet.ActiveAdamW(model, lr=1e-2, warmup_steps=5)
    manager = smet.TopologyManager(model, optimizer, total_steps=20, every=5, grow=grow)
    tokens = torch.randint(64, (8, 16))
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        max_grad_norm=1.0,
        bf16=bf16,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    before = model(input_ids=tokens, labels=tokens).loss.item()
    Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        optimizers=(optimizer, None),
        callbacks=[ChangeTopology(manager)],
    ).train()
    assert [event.step for event in manager.history] == [5, 10]
    assert model(input_ids=tokens, labels=tokens).loss.item() < before - 0.5
