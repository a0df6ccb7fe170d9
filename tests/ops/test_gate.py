"""No topology, list or age that was not checked reaches a kernel, wherever it came from."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import smet_compile as smet
from smet_compile.format import Layout, Topology, pack_bits
from smet_compile.ops import find_sites, gate
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same, snapshot
from tests.support.training import train

BLOCKS = (1, (1, 4), (4, 4))
blocks = pytest.mark.parametrize("block", BLOCKS, ids=str)
NO_DATA = r"0\.weight: has no data yet .* smet_compile\.materialize"
WRITTEN = r"0\.weight: its topology was written from outside"


def sparse(block: int | tuple[int, int] = 1, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model = two_layers()
    return smet.sparsify(model, 0.4, block_shape=block)


def x() -> Tensor:
    return torch.randn(3, 12, generator=torch.Generator().manual_seed(0))


def fill_memory(model: nn.Module, with_ones: bool) -> None:
    """Writes what ``to_empty`` may leave there: it differs from run to run."""
    for site in find_sites(model).values():
        site.compact.topology.fill_(255 if with_ones else 0)
        site.compact.lists.fill_(2**30)


@blocks
@pytest.mark.parametrize("with_ones", [False, True])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_memory_that_nobody_wrote_is_not_followed(block: int | tuple[int, int], with_ones: bool, device: str) -> None:
    model = sparse(block, device).to_empty(device="cpu")
    fill_memory(model, with_ones)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    optimizer = smet.ActiveAdamW(model)
    uses: dict[str, Callable[[], object]] = {
        "forward": lambda: model(x()),
        "read": lambda: model[0].weight,
        "assignment": lambda: setattr(model[0], "weight", torch.ones(20, 12)),
        "mask": lambda: find_sites(model)["0.weight"].mask(),
        "export": lambda: smet.export_dense(model),
    }
    for use, call in uses.items():
        with pytest.raises(ValueError, match=NO_DATA):
            call()
            raise AssertionError(f"{use} was taken")
    for site in find_sites(model).values():
        site.values.grad = torch.ones_like(site.values)
    with pytest.raises(ValueError, match=NO_DATA):
        optimizer.step()


@blocks
def test_data_ends_that(block: int | tuple[int, int]) -> None:
    source, model = sparse(block), sparse(block, "meta").to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    assert torch.equal(model(x()), source(x()))


@blocks
def test_moved_copied_and_rewritten_alike_is_the_same(block: int | tuple[int, int]) -> None:
    model = sparse(block)
    expected = model(x())
    for same in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model)).to(torch.float64).to(torch.float32)):
        assert torch.equal(same(x()), expected)
    with torch.no_grad():
        for buffer in model.buffers():  # as DistributedDataParallel does in every forward
            buffer.copy_(buffer.clone())
    assert torch.equal(model(x()), expected)


@blocks
def test_lists_that_were_written_are_made_again(block: int | tuple[int, int]) -> None:
    model = sparse(block)
    expected = model(x())
    for site in find_sites(model).values():
        site.compact.lists.fill_(2**30)
    assert torch.equal(model(x()), expected)


def another(bits: Tensor) -> Tensor:
    """Returns a mask of as many blocks, elsewhere."""
    moved = bits.clone()
    byte = int((bits != bits.roll(1)).nonzero()[0])
    moved[byte], moved[byte - 1] = bits[byte - 1], bits[byte]
    return moved


@blocks
@pytest.mark.parametrize("change", [lambda bits: bits.roll(1) | 1, torch.zeros_like, another])
def test_bits_that_were_written_from_outside_are_refused(
    block: int | tuple[int, int], change: Callable[[Tensor], Tensor]
) -> None:
    model = sparse(block)
    topology = find_sites(model)["0.weight"].compact.topology
    before = topology.clone()
    topology.copy_(change(topology))
    for call in (lambda: model(x()), model.state_dict):
        with pytest.raises(ValueError, match=WRITTEN):
            call()
    topology.copy_(before)
    model(x())


def test_a_compiled_graph_is_refused_the_same() -> None:
    model = sparse()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x()).sum().backward()
    find_sites(model)["0.weight"].compact.topology.fill_(255)
    with pytest.raises(ValueError, match=WRITTEN):
        compiled(x())


def test_an_assigned_topology_is_checked() -> None:
    model = sparse((4, 4))
    compact = find_sites(model)["0.weight"].compact
    mask = compact.mask().roll(1)
    compact.topology = pack_bits(mask)
    assert torch.equal(model[0].weight != 0, mask.view(5, 3).repeat_interleave(4, 0).repeat_interleave(4, 1))
    with pytest.raises(ValueError, match=r"0\.weight: topology: expected 6 active blocks.*got 15"):
        compact.topology = pack_bits(torch.ones(15, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"0\.weight: topology: expected uint8 of shape \(2,\)"):
        compact.topology = torch.ones(15, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"0\.weight: expected 6 active blocks.*got 5"):
        compact.set_mask(torch.arange(15) < 5)
    assert torch.equal(compact.mask(), mask)


@blocks
def test_a_bit_behind_the_last_block_is_refused(block: int | tuple[int, int]) -> None:
    model = sparse(block)
    state = model.state_dict()
    site, name = find_sites(model)["3.weight"], "3.parametrizations.weight.0.topology"
    if site.layout.num_blocks % 8 == 0:
        return
    bits = pack_bits(site.mask())
    first = int(bits.nonzero()[0])
    bits[first] &= bits[first] - 1  # one block fewer, and a bit that is none: the count is right
    bits[-1] |= 128
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"3\.weight: topology: expected zeros behind the last of \d+ blocks"):
        model.load_state_dict(state | {name: bits})
    assert_same(snapshot(model), before)


def test_an_op_checks_what_it_is_given_alone() -> None:
    values, layout = torch.ones(5), Layout.of((4, 4), (1, 1))
    right, wrong = (Topology.from_mask(torch.arange(16) < count, layout) for count in (5, 7))
    torch.ops.smet.unpack(values, right.bits, right.lists, layout.text, None, None, False)
    with pytest.raises(ValueError, match="topology: expected 5 active blocks, one for each row of the values, got 7"):
        torch.ops.smet.unpack(values, wrong.bits, wrong.lists, layout.text, None, None, False)
    with pytest.raises(ValueError, match="topology: expected 5 active blocks"):
        torch.ops.smet.masked_matmul(torch.ones(2, 4), values, wrong.bits, wrong.lists, layout.text, True)
    strange = torch.full((2,), 2**30, dtype=torch.int32)
    with pytest.raises(ValueError, match="topology: expected the lists that are derived from it"):
        torch.ops.smet.pack(torch.ones(4, 4), right.bits, strange, layout.text, 5)


def test_another_shape_of_the_same_matrices_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled 1x1 convolution multiplies by the layout of its matrix; a check in every op would read all bits."""
    model = smet.sparsify(nn.Sequential(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 4, 1)), 0.5, include=["0.weight"])
    (site,) = find_sites(model).values()
    compact, flat = site.compact, Layout((8, 6), (8, 6), (1, 1))
    bits, lists = compact.topology, compact.lists
    assert compact.active.layout.shape == (8, 6, 1, 1)
    checks: list[Layout] = []
    check = gate.topology_error
    monkeypatch.setattr(gate, "topology_error", lambda bits, layout, n: checks.append(layout) or check(bits, layout, n))
    found = [gate.find(bits, lists, flat.text, compact.num_active) for _ in range(3)]
    assert found[0] is found[1] is found[2] and found[0].layout == flat and not checks
    assert gate.find(bits, lists, compact.layout.text, compact.num_active) is compact.active
    other = Layout((6, 8), (6, 8), (1, 1))
    assert gate.find(bits, lists, other.text, compact.num_active).layout == other and checks == [other]
    compact.set_mask(compact.mask().flip(0))
    assert gate.find(bits, lists, flat.text, compact.num_active) is not found[0]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize("number", [-1, 256, 30_000])
def test_a_generation_outside_the_table_is_refused(dtype: torch.dtype, number: int) -> None:
    model = sparse()
    optimizer = smet.ActiveAdamW(model, lr=1e-2)
    train(model, optimizer)
    state = optimizer.state[find_sites(model)["0.weight"].values]
    state["generation"] = torch.full_like(state["generation"], number, dtype=dtype)
    before = snapshot(model)
    train_once = pytest.raises(ValueError, match=r"0\.weight: expected generations from 0 to 255.*got " + str(number))
    with train_once:
        train(model, optimizer)
    assert_same(snapshot(model), before)


def test_state_of_another_form_is_refused_by_name() -> None:
    model = sparse()
    optimizer = smet.ActiveAdamW(model, lr=1e-2, moment_dtype="int8")
    train(model, optimizer)
    state = optimizer.state[find_sites(model)["0.weight"].values]
    for key, wrong in {
        "generation": state["generation"][:3],
        "births": state["births"].int(),
        "step": state["step"].float(),
        "num_skipped": torch.zeros(2, dtype=torch.int64),
        "scales": state["scales"][:1],
        "exp_avg": state["exp_avg"][:3],
    }.items():
        kept, state[key] = state[key], wrong
        with pytest.raises(ValueError, match=rf"0\.weight: expected .*{key}"):
            train(model, optimizer)
        state[key] = kept
    train(model, optimizer)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("block", [1, (4, 4)], ids=str)
def test_an_average_across_topologies_is_refused(use_buffers: bool, block: int | tuple[int, int]) -> None:
    model = sparse(block)
    optimizer = smet.ActiveAdamW(model, lr=1e-2)
    manager = smet.TopologyManager(model, optimizer, total_steps=40, every=2, schedule="cosine")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    if not use_buffers:
        average.update_parameters(model)
        assert torch.equal(average(x()), model(x()))
    for step in range(4):
        train(model, optimizer, manager, first=step)
        average.update_parameters(model)
    assert len(manager.history) == 2
    for call in (lambda: average(x()), average.state_dict, lambda: smet.export_dense(average)):
        with pytest.raises(ValueError, match=WRITTEN + r".*AveragedModel\(export_dense\(model\)\)"):
            call()


ODD_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "largest": lambda t: torch.full_like(t, torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).max),
    "shorter": lambda t: t[:-1].clone() if t.dim() else t.repeat(3),
    "longer": lambda t: torch.cat([t, t]) if t.dim() else t.repeat(2),
    "int64": lambda t: t.to(torch.int64),
    "int16": lambda t: t.to(torch.int16),
    "shuffled": lambda t: t.flatten().flip(0).view(t.shape).clone(),
    "numbers": lambda t: torch.arange(-2, t.numel() - 2).view(t.shape).to(t.dtype),
    "meta": lambda t: t.to("meta"),
}
STATE = ("exp_avg", "exp_avg_sq", "step", "num_skipped", "generation", "births", "scales")
WHERES = ("topology", "lists", "values", *STATE)


@pytest.mark.parametrize("how", ["in place", "replaced", "data"])
@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("block", [1, (4, 4)], ids=str)
def test_whatever_is_written_is_refused_or_trained_on(block: int | tuple[int, int], where: str, how: str) -> None:
    """A kernel that followed it would end the process."""
    for odd in ODD_TENSORS.values():
        model = sparse(block)
        optimizer = smet.ActiveAdamW(model, lr=1e-2, moment_dtype="int8" if where == "scales" else None)
        train(model, optimizer)
        site = find_sites(model)["0.weight"]
        holder: dict[str, Any] = optimizer.state[site.values] if where in STATE else site.compact._buffers
        current = site.values if where == "values" else holder[where]
        try:
            new = odd(current.detach())
            if how == "in place":
                current.detach().copy_(new)
            elif how == "data" or where == "values":
                current.data = new
            else:
                holder[where] = new
        except (RuntimeError, NotImplementedError):  # torch takes no such tensor there
            continue
        try:
            train(model, optimizer, first=1)
        except ValueError as error:
            assert "0.weight" in str(error) or "values" in str(error)
        except (RuntimeError, NotImplementedError):
            assert where == "values"  # of a dtype or on a device that torch's own product refuses
