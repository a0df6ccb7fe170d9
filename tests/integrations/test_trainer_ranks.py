"""The Trainer trains sparse in two processes as in one with the same batches, and resumes bit for bit in each."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from smet_compile.integrations.transformers import sparse_training
from tests.integrations.language import ROWS, arguments_in, llama
from tests.integrations.worlds import launched
from tests.support.ranks import processes


def run(folder: Path, world: int, checkpoint: Path | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
    options: Any = {"per_device_train_batch_size": 8 // world, "logging_steps": 1, "max_steps": 6, "save_steps": 4}
    options["ddp_backend"] = "gloo" if world > 1 else None
    trainer = Trainer(llama(), arguments_in(folder, **options), train_dataset=ROWS)
    callback = sparse_training(trainer, 0.3, every=2, warmup_steps=3)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert [event.step for event in callback.manager.history] == [2, 4]
    losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
    return losses, {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def in_processes(rank: int, world: int, folder: Path) -> tuple[list[float], bool, list[bool]]:
    with launched(rank, world):
        losses, state = run(folder, world)
        _, resumed = run(folder, world, folder / "checkpoint-4")
    alike = all(torch.equal(tensor, resumed[name]) for name, tensor in state.items())
    bits = torch.cat([tensor for name, tensor in sorted(state.items()) if name.endswith("topology")])
    of_ranks = [torch.empty_like(bits) for _ in range(world)]
    torch.distributed.all_gather(of_ranks, bits)
    return losses, alike, [torch.equal(each, bits) for each in of_ranks]


@pytest.mark.filterwarnings("ignore:TopologyManager")
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    expected, _ = run(tmp_path / "one", 1)
    for losses, alike, topologies in processes.run(2, in_processes, tmp_path / "two"):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert alike and all(topologies)
