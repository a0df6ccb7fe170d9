"""With DistributedDataParallel gradients are kept, and the step is the loop in which every rank reduces them."""

import socket
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.support.snapshots import assert_same
from tests.train_step.setting import Run, assert_close, assert_nothing_left, batch_of, sparse, twice

NUM_STEPS = 8


def train(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    step_run, loop_run = twice(sparse(), grow="gradient", every=3)
    batches = [batch_of(10 * step + rank) for step in range(NUM_STEPS)]
    whole = Run(DistributedDataParallel(step_run.model), step_run.optimizer, step_run.manager)
    step = whole.compiled("aot_eager")
    whole.in_step(step, batches)
    loop_run.in_loop(batches, DistributedDataParallel(loop_run.model))
    assert_nothing_left(step_run.model)
    runs = [
        {"losses": run.losses, "state": run.state(), "model": run.model.state_dict()} for run in (step_run, loop_run)
    ]
    runs[0]["losses"] = whole.losses
    history = [step_run.history(), loop_run.history()]
    torch.save({"runs": runs, "history": history, "fused": step.fused}, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_equals_the_loop(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(train, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for saved in (first, second):
        assert_close(*saved["runs"], "run")
        assert saved["history"][0] == saved["history"][1] and len(saved["history"][0]) == 2
        assert not saved["fused"]
    assert_same(first["runs"][0]["model"], second["runs"][0]["model"])
    assert first["runs"][0]["losses"] != second["runs"][0]["losses"]
