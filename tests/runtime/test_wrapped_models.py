"""A model that is compiled or data-parallel, in whole or in part, is the same model: in files, names and seeds."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import smet_compile as smet
from smet_compile.ops import canonical_name, find_sites
from smet_compile.ops.sites import _WRAPPERS
from tests.support.altered_files import read_file, write_file
from tests.support.small_models import two_layers
from tests.support.snapshots import assert_same
from tests.support.training import train


def compiled_child(model: nn.Module) -> nn.Module:
    model[0] = torch.compile(model[0], backend="eager")
    return model


def checkpointed_child(model: nn.Module) -> nn.Module:
    model[0] = checkpoint_wrapper(model[0])
    return model


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "plain": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled child": compiled_child,
    "data parallel": nn.DataParallel,
    "compiled data parallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "data parallel compiled": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "checkpointed child": checkpointed_child,
}


def make(wrap: str, grow: str = "random", seed: int = 0) -> tuple[Any, Any, Any]:
    torch.manual_seed(seed)
    model = WRAPPED[wrap](smet.sparsify(two_layers().bfloat16(), density=0.4))
    optimizer = smet.ActiveAdamW(model, lr=1e-2, warmup_steps=3)
    return model, optimizer, smet.TopologyManager(model, optimizer, total_steps=100, every=2, grow=grow)


def state_of(model: nn.Module, optimizer: Any, manager: Any) -> list[Any]:
    named = {canonical_name(model, name): tensor for name, tensor in model.state_dict().items()}
    return [named, optimizer.state_dict(), manager.state_dict()]


@pytest.mark.parametrize("wrap", list(WRAPPED))
def test_one_run_whatever_wraps_the_model(wrap: str, tmp_path: Path) -> None:
    """Growth, stochastic rounding and files go by canonical names; a file goes both ways."""
    plain, wrapped, other = make("plain"), make(wrap), make(wrap, seed=7)
    with torch.compiler.set_stance("force_eager"):
        assert train(*plain, steps=5) == train(*wrapped, steps=5)
    assert_same(state_of(*wrapped), state_of(*plain))
    smet.save_checkpoint(tmp_path / "wrapped", *wrapped)
    smet.save_checkpoint(tmp_path / "plain", *plain)
    assert list(read_file(tmp_path / "wrapped")[1]["model"]) == list(plain[0].state_dict())
    smet.load_checkpoint(tmp_path / "plain", *other)
    assert_same(state_of(*other), state_of(*plain))
    another = make("plain", seed=7)
    smet.load_checkpoint(tmp_path / "wrapped", *another)
    assert_same(state_of(*another), state_of(*plain))


@pytest.mark.parametrize("wrap", list(WRAPPED))
@pytest.mark.parametrize("into", ["plain", "data parallel", "same"])
def test_files_of_older_versions_have_the_names_of_wrappers(wrap: str, into: str, tmp_path: Path) -> None:
    run, other = make(wrap), make(wrap if into == "same" else into, seed=7)
    with torch.compiler.set_stance("force_eager"):
        train(*run, steps=5)
    smet.save_checkpoint(tmp_path / "a", *run, extra={"step": 5})
    tensors, body = read_file(tmp_path / "a")
    write_file(tmp_path / "a", tensors, as_older_versions_wrote(body, run[0]))
    assert smet.load_checkpoint(tmp_path / "a", *other) == {"step": 5}
    assert_same(state_of(*other), state_of(*run))


def as_older_versions_wrote(body: Any, model: nn.Module) -> Any:
    """Without settings, versions of modules and the list of states; with the names that wrappers give."""
    raw = {canonical_name(model, name): name for name in model.state_dict()}
    for prefix, module in model.named_modules():
        if "parametrizations" in module._modules:
            raw[canonical_name(model, f"{prefix}.weight")] = f"{prefix}.weight"
    del body["model_metadata"], body["optimizer"]["with_state"], body["manager"]["settings"]
    for part in (body, body["manager"]["trace"]):
        for key in {"model", "layouts", "explored", "grown"} & part.keys():
            part[key] = {raw[name]: value for name, value in part[key].items()}
    for event in body["manager"]["history"]:
        event["sites"] = {raw[name]: value for name, value in event["sites"].items()}
    body["optimizer"]["names"] = [[raw[name] for name in group] for group in body["optimizer"]["names"]]
    return json.loads(json.dumps(body))


class WithChild(nn.Module):
    """Its children have names that wrappers use."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(8, 8)
        self._orig_mod = nn.ModuleDict({"module": nn.Linear(8, 8)})


def test_children_of_the_users_own_keep_their_names() -> None:
    names = ["module.weight", "_orig_mod.module.weight"]
    model = smet.sparsify(WithChild(), density=0.5)
    assert list(find_sites(model)) == names
    assert list(find_sites(nn.DataParallel(model))) == names
    assert list(find_sites(torch.compile(nn.DataParallel(model)))) == names
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    assert canonical_name(averaged, "module.weight") == "module.weight"


@pytest.mark.parametrize(("where", "name", "child"), _WRAPPERS)
def test_the_wrappers_are_where_torch_has_them(where: str, name: str, child: str) -> None:
    """Private names of torch, and of Lightning: if one moves, this fails, and models it wraps would be other models."""
    torch.compile(nn.Linear(2, 2))
    wrapper = getattr(sys.modules[where] if where.startswith("torch.") else pytest.importorskip(where), name)
    assert issubclass(wrapper, nn.Module)
    made = {
        "OptimizedModule": lambda: torch.compile(nn.Linear(2, 2)),
        "DataParallel": lambda: nn.DataParallel(nn.Linear(2, 2)),
        "ActivationWrapper": lambda: checkpoint_wrapper(nn.Linear(2, 2)),
    }
    if name in made:
        assert isinstance(made[name](), wrapper) and list(made[name]()._modules) == [child]


@pytest.fixture
def fabric() -> Any:
    return pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)


def test_a_model_that_fabric_has_set_up(fabric: Any, tmp_path: Path) -> None:
    """Its files go between it and the plain model, and so does a state of its manager."""

    def make_in_fabric(seed: int) -> tuple[Any, Any, Any]:
        torch.manual_seed(seed)
        plain = smet.sparsify(two_layers().bfloat16(), density=0.4)
        model, optimizer = fabric.setup(plain, smet.ActiveAdamW(plain, lr=1e-2, warmup_steps=3))
        return model, optimizer, smet.TopologyManager(model, optimizer, total_steps=100, every=2)

    plain, run, other = make("plain"), make_in_fabric(0), make_in_fabric(7)
    assert train(*plain, steps=5) == train(*run, steps=5)
    assert list(find_sites(run[0])) == list(find_sites(plain[0]))
    names = [canonical_name(run[0], name) for name, _ in run[0].named_parameters(remove_duplicate=False)]
    assert names == 2 * [name for name, _ in plain[0].named_parameters()]
    smet.save_checkpoint(tmp_path / "fabric", *run)
    smet.save_checkpoint(tmp_path / "plain", *plain)
    assert list(read_file(tmp_path / "fabric")[1]["model"]) == list(plain[0].state_dict())
    smet.load_checkpoint(tmp_path / "plain", *other)
    another = make("plain", seed=7)
    smet.load_checkpoint(tmp_path / "fabric", *another)
    assert_same(other[2].state_dict(), plain[2].state_dict())
    assert_same(state_of(*another), state_of(*plain))
    fabric.save(tmp_path / "run", {"model": run[0], "optimizer": run[1]})
    again = make_in_fabric(7)
    fabric.load(tmp_path / "run", {"model": again[0], "optimizer": again[1]})
    assert_same(again[2].state_dict(), run[2].state_dict())
    assert type(smet.export_dense(run[0])) is nn.Sequential


def test_a_state_with_other_names_is_not_said_to_be_cut() -> None:
    manager, other = make("plain")[2], make("plain")[2]
    state = manager.state_dict()
    state["owed"] = {f"wrapper.{name}": blocks for name, blocks in state["owed"].items()}
    with pytest.raises(ValueError, match=r"owed: got 'wrapper\.0\.weight', which is no name in this model"):
        other.load_state_dict(state)


def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, optimizer, manager = make("plain")
        wrapped = nn.parallel.DistributedDataParallel(model)
        another = smet.ActiveAdamW(wrapped, lr=1e-2, warmup_steps=3)
        assert list(smet.TopologyManager(wrapped, another, total_steps=100, auto_step=False).sites) == list(
            manager.sites
        )
        train(wrapped, optimizer, manager, steps=3)
        smet.save_checkpoint(tmp_path / "a", wrapped, optimizer, manager)
        other = make("plain", seed=7)
        smet.load_checkpoint(tmp_path / "a", *other)
        assert_same(state_of(*other), state_of(model, optimizer, manager))
        smet.load_checkpoint(tmp_path / "a", nn.parallel.DistributedDataParallel(other[0]), *other[1:])
    finally:
        torch.distributed.destroy_process_group()
