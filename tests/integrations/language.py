"""Makes a tiny language model, its data and its Trainer."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

STEPS = 12
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64
}  # fmt: skip
ROWS = [
    {"input_ids": row, "labels": row} for row in torch.randint(64, (64, 16), generator=torch.Generator().manual_seed(0))
]


def llama(**shape: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | shape))


def arguments_in(folder: Path, **options: Any) -> TrainingArguments:
    settings = {"per_device_train_batch_size": 4, "save_steps": 4, "logging_steps": 2, "weight_decay": 0.1} | options
    settings.setdefault("max_steps", STEPS)
    return TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=3e-3, **settings)


class Listener(TrainerCallback):
    """Keeps what reporters are given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def trainer_in(folder: Path, **options: Any) -> Trainer:
    return Trainer(llama(), arguments_in(folder, **options), train_dataset=ROWS, callbacks=[Listener()])
