"""A step can be captured in a CUDA graph, once one like it was made: nothing is copied from the host then.

A capture is pretended where there is no GPU: the launches are made at once, and what is refused is refused.
"""

import gc

import pytest
import torch
from torch import Tensor

import smet_compile as smet
from smet_compile.ops import captures, choose, law_of_updates
from smet_compile.ops.updates import Update
from tests.ops.kernels.adamw_cases import Case, copy_of, differences, update_of
from tests.ops.kernels.device import DEVICE, INTERPRETED, on_device
from tests.support.host_syncs import host_syncs

pytest.importorskip("triton")
from smet_compile.ops.kernels.triton import adamw, adamw_tables, sampled_update

pytestmark = on_device
pretended = pytest.mark.skipif(not INTERPRETED, reason="a GPU captures; test_graphs_on_a_gpu.py is for it")

BF16, FP32, CPU = torch.bfloat16, torch.float32, torch.device("cpu")
CASES = [Case((37, 29)), Case((45, 67), (1, 1)), Case((70, 100), (32, 32))]
REFUSED = r"CUDA graph: expected tables of the parameters' addresses on the device before the capture"


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Pretends a capture from now on; ``undo`` ends it."""
    adamw._tables_of_one_row.cache_clear()
    adamw._launch_of_one_row.cache_clear()
    return monkeypatch


def begin(capture: pytest.MonkeyPatch) -> list[str]:
    """Begins a capture; returns the list of what is copied from the host in it."""
    copied: list[str] = []
    capture.setattr(captures, "is_capturing", lambda device: True)
    capture.setattr(adamw_tables, "_on_host", lambda *_: copied.append("a table"))
    return copied


def updates_of(cases: list[Case]) -> tuple[list[Update], list[Update]]:
    before = [update_of(case, BF16, FP32, seed=seed) for seed, case in enumerate(cases)]
    rate = torch.tensor([0.01], dtype=torch.float64, device=DEVICE)
    return [copy_of(each, CPU) for each in before], [copy_of(each, DEVICE, lr=rate) for each in before]


def all_differences(actual: list[Update], expected: list[Update]) -> list[list[str]]:
    return [differences(*pair) for pair in zip(actual, expected, strict=True)]


@pretended
@pytest.mark.parametrize("count", [1, 3])
def test_the_first_step_cannot_be_captured(count: int, capture: pytest.MonkeyPatch) -> None:
    _, updates = updates_of(CASES[:count])
    before = [copy_of(each, DEVICE) for each in updates]
    copied = begin(capture)
    with pytest.raises(RuntimeError, match=REFUSED):
        adamw.update_all(updates)
    assert all_differences(updates, before) == [[]] * count and copied == []


@pretended
@pytest.mark.parametrize("count", [1, 3])
def test_a_captured_step_equals_the_law(count: int, capture: pytest.MonkeyPatch) -> None:
    """Its gradients lie elsewhere than those of the steps before, as in the memory of a graph."""
    expected, actual = updates_of(CASES[:count])
    for step in range(3):
        if step == 1:
            copied = begin(capture)
        for each in actual:
            each.grad = each.grad.clone()
        law_of_updates.update_all(expected)
        adamw.update_all(actual)
    assert all_differences(actual, expected) == [[]] * count and copied == []


@pretended
def test_more_parameters_than_a_launch_writes_addresses_of(capture: pytest.MonkeyPatch) -> None:
    capture.setattr(adamw_tables, "_AT_ONCE", 2)
    expected, actual = updates_of([*CASES, *CASES[:2]])
    for step in range(2):
        if step == 1:
            begin(capture)
        law_of_updates.update_all(expected)
        adamw.update_all(actual)
    assert all_differences(actual, expected) == [[]] * 5


@pretended
def test_tables_that_are_made_before_a_compiled_graph_runs(capture: pytest.MonkeyPatch) -> None:
    """A compiled graph makes each update anew, from the same tensors; its first run may lie in a graph's memory."""
    (expected,), (actual,) = updates_of([CASES[2]])
    stand_in = copy_of(actual, DEVICE)
    for name in ("values", "slots", "scales", "num_skipped", "step", "generation", "births", "topology"):
        setattr(stand_in, name, getattr(actual, name))
    stand_in.grad = stand_in.values
    adamw.prepare_update(stand_in)
    begin(capture)
    adamw.update_all([actual])
    law_of_updates.update_all([expected])
    assert all_differences([actual], [expected]) == [[]]
    actual.values = actual.values.clone()
    actual.prepared.clear()
    with pytest.raises(RuntimeError, match=REFUSED):
        adamw.update_all([actual])


@pretended
def test_a_fused_product(capture: pytest.MonkeyPatch) -> None:
    (expected,), (actual,) = updates_of([CASES[2]])
    left, right = torch.randn(40, 70).bfloat16(), torch.randn(40, 100).bfloat16()
    actual.grad = actual.values
    assert sampled_update.fuses(left, None, actual)
    begin(capture)
    with pytest.raises(RuntimeError, match=REFUSED):
        sampled_update.sampled_update(left, right, None, actual)
    assert int(actual.step) == int(expected.step)
    capture.undo()
    adamw.prepare_update(actual)
    begin(capture)
    sampled_update.sampled_update(left, right, None, actual)
    assert int(actual.step) == int(expected.step) + 1


@pretended
def test_a_rate_on_the_host_cannot_be_captured(capture: pytest.MonkeyPatch) -> None:
    _, updates = updates_of(CASES)
    adamw.update_all(updates)
    for each in updates:
        each.lr = torch.tensor(0.01)
    begin(capture)
    with pytest.raises(RuntimeError, match="got lr on the CPU; pass a tensor on"):
        adamw.update_all(updates)


def tables_of(updates: list[Update]) -> list[Tensor]:
    launches = [launch for launch, _ in adamw._launches_of(updates)]
    found = [(*launch.make_tables(), launch._step_table) for launch in launches]
    return [table for tables in found for table in tables if table is not None and table.numel()]


def test_no_table_is_written_to_once_it_is_made() -> None:
    """Another stream may still read the tables of the step before."""
    expected, actual = updates_of(CASES)
    adamw.update_all(actual)
    first = tables_of(actual)
    content = [table.clone() for table in first]
    for each in actual:
        each.grad = each.grad.clone()
    adamw.update_all(actual)
    for _ in range(2):
        law_of_updates.update_all(expected)
    assert all_differences(actual, expected) == [[]] * 3
    assert all(torch.equal(table, same) for table, same in zip(first, content, strict=True))
    assert len(first) == 4 and tables_of(actual)[-1] is not first[-1]


def test_models_share_no_table() -> None:
    one, other = (updates_of(CASES)[1] for _ in range(2))
    for updates in (one, other):
        adamw.update_all(updates)
    addresses = [{table.data_ptr() for table in tables_of(updates)} for updates in (one, other)]
    assert not addresses[0] & addresses[1]


@pretended
def test_the_tables_of_a_graph_live_as_long_as_its_first_weight(capture: pytest.MonkeyPatch) -> None:
    _, updates = updates_of(CASES)
    adamw.update_all(updates)
    begin(capture)
    adamw.update_all(updates)
    launch = adamw._launches_of(updates)[0][0]
    addresses = {id(table) for table in launch.make_tables()}
    for each in updates:
        each.prepared.clear()
    weight = updates[0].values
    del updates, each, launch
    gc.collect()
    assert {id(table) for table in captures._graphs[weight].read} == addresses
    before = len(captures._graphs)
    del weight
    gc.collect()
    assert len(captures._graphs) == before - 1


def test_nothing_waits_for_the_device(capture: pytest.MonkeyPatch) -> None:
    """The launches of products and of the optimizer read no number of the device, and copy none from it."""
    capture.setenv("SMET_COMPILE_KERNEL", "triton")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32)).to(DEVICE)
    smet.sparsify(model, 0.5, block_shape=1, include=["0.weight"])
    smet.sparsify(model, 0.5, block_shape=16, include=["2.weight"])
    optimizer = smet.ActiveAdamW(model, lr=1e-2)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        optimizer.zero_grad()
        model(torch.randn(8, 32, device=DEVICE)).square().mean().backward()
        with host_syncs() as found:
            optimizer.step()
        assert step == 0 or found == []
    assert choose.update_kernel_of(next(iter(optimizer._ready.values())).update).name == "triton_adamw"
