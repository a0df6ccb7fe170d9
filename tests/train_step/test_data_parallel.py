"""With DistributedDataParallel gradients are kept, and the step is the loop in which every rank reduces them."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from tests.support.ranks import processes
from tests.support.snapshots import assert_same
from tests.train_step.setting import (
    Net,
    Output,
    Run,
    active,
    assert_close,
    assert_equal_runs,
    assert_nothing_left,
    batch_of,
    sparse,
    twice,
)

NUM_STEPS = 8
ACCUMULATE = 3


def train(rank: int, world: int, folder: Path) -> None:
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
    torch.save({"runs": runs, "history": history, "fused": step.fused}, folder / f"{rank}.pt")
    with torch.compiler.set_stance("force_eager"):
        for options in ({}, {"static_graph": True}):
            check_accumulation(rank, Net, options)
        check_accumulation(rank, Nested, {})
        check_broken_accumulation(rank)


class Nested(nn.Module):
    """Is parallel in a part. The rest is the same on all ranks, since its gradient is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def forward(self, x: Tensor, y: Tensor) -> Output:
        loss: Output = self.inner(x, y)
        return loss


def parallel(model: nn.Module, **options: Any) -> tuple[nn.Module, list[int]]:
    """Returns ``model`` with gradients reduced in several buckets, and a list of the elements of each reduction."""
    of = model.inner if isinstance(model, Nested) else model
    wrapped, sizes = DistributedDataParallel(of, bucket_cap_mb=0.0005, **options), []

    def reduce(_: Any, bucket: GradBucket) -> Future[Tensor]:
        sizes.append(bucket.buffer().numel())
        total = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        reduced: Future[Tensor] = total.then(lambda done: done.value()[0])
        return reduced

    wrapped.register_comm_hook(None, reduce)
    if isinstance(model, Nested):
        model.inner = wrapped
        return model, sizes
    return wrapped, sizes


def check_accumulation(rank: int, make_model: Any, options: dict[str, Any]) -> None:
    """Checks that every gradient is reduced once per optimizer step, which is that of the mean over calls and ranks."""
    torch.manual_seed(0)
    step_run, loop_run = twice(sparse(make_model))
    num_weights = sum(p.numel() for p in step_run.model.parameters())
    whole, sizes = parallel(step_run.model, **options)
    step = Run(whole, step_run.optimizer).compiled(accumulate=ACCUMULATE)
    for call in range(2 * ACCUMULATE):
        step(batch_of(10 * call + rank))
    once_a_call = "static_graph" in options  # torch does not let it do without
    assert sum(sizes) == 2 * num_weights * (ACCUMULATE if once_a_call else 1), sizes
    for call in range(2 * ACCUMULATE):
        for each in range(2):
            (loop_run.model(**batch_of(10 * call + each)).loss / (2 * ACCUMULATE)).backward()
        if call % ACCUMULATE == ACCUMULATE - 1:
            loop_run.optimizer.step()
            loop_run.optimizer.zero_grad()
    for actual, expected in zip(step_run.model.parameters(), loop_run.model.parameters(), strict=True):
        assert_close(actual, expected, "model")


def check_broken_accumulation(rank: int) -> None:
    """Breaks every rank in the same call: the first ones reduce nothing, in the last some buckets are under way."""
    torch.manual_seed(0)
    model = sparse()
    whole, sizes = parallel(model)
    run = Run(whole, active(model))
    step = run.compiled(accumulate=ACCUMULATE)

    def interrupt(_: Tensor) -> None:
        raise KeyboardInterrupt

    for broken_call in (1, 2):
        for call in range(broken_call + 1):
            handle = model.norm.bias.register_hook(interrupt) if call == broken_call else None
            try:
                step(batch_of(10 * call + rank))
            except KeyboardInterrupt:
                assert handle is not None
                handle.remove()
        assert_nothing_left(model)
        sizes.clear()
        other = copy.deepcopy(model)
        fresh = Run(parallel(other)[0], active(other))
        fresh.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        for each, own in ((run, step), (fresh, fresh.compiled(accumulate=ACCUMULATE))):
            each.losses.clear()
            each.in_step(own, [batch_of(100 + 10 * call + rank) for call in range(ACCUMULATE)])
        assert sum(sizes) == sum(p.numel() for p in model.parameters())
        assert_equal_runs(run, fresh)


def test_equals_the_loop(tmp_path: Path) -> None:
    processes.run(2, train, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for saved in (first, second):
        assert_close(*saved["runs"], "run")
        assert saved["history"][0] == saved["history"][1] and len(saved["history"][0]) == 2
        assert not saved["fused"]
    assert_same(first["runs"][0]["model"], second["runs"][0]["model"])
    assert first["runs"][0]["losses"] != second["runs"][0]["losses"]
