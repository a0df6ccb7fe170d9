"""A load that fails although every check has passed leaves everything as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import smet_compile as smet
from smet_compile.runtime import checkpoint, checkpoint_file
from tests.runtime.setting import make
from tests.support.snapshots import assert_same, snapshot
from tests.support.states import Unchanged
from tests.support.training import train


class Failing(nn.Module):
    """Loads, and then raises; keeps extra state."""

    error: BaseException | None = None

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.extra = {"a": [1]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.sum()

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        if Failing.error is not None:
            error, Failing.error = Failing.error, None
            raise error


def make_failing() -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model, *_ = make(density=0.4)
    model.append(Failing())
    model.append(nn.BatchNorm1d(7))
    optimizer = smet.ActiveAdamW(model, lr=1e-2)
    return model, optimizer, smet.TopologyManager(model, optimizer, total_steps=100, every=2, grow="gradient")


@pytest.mark.parametrize("error", [RuntimeError("late"), KeyError("late"), KeyboardInterrupt("late")], ids=repr)
def test_a_module_that_fails_to_load(error: BaseException, tmp_path: Path) -> None:
    saved, objects, twin = make_failing(), make_failing(), make_failing()
    saved[0][4].extra = {"a": [2]}
    train(*saved, steps=5)
    smet.save_checkpoint(tmp_path / "a", *saved)
    for run in (objects, twin):
        torch.manual_seed(1)
        train(*run, steps=3)
    lists = [site.compact.lists.clone() for site in objects[2].sites.values()]
    random, groups = torch.get_rng_state(), [*map(id, objects[1].param_groups)]
    Failing.error = error
    expected = ValueError if isinstance(error, Exception) else KeyboardInterrupt
    with Unchanged(*objects), pytest.raises(expected, match="late"):
        smet.load_checkpoint(tmp_path / "a", *objects)
    assert objects[0][4].extra == {"a": [1]} and [*map(id, objects[1].param_groups)] == groups
    assert all(map(torch.equal, [site.compact.lists for site in objects[2].sites.values()], lists))
    assert torch.equal(torch.get_rng_state(), random)
    assert train(*objects, first=3, steps=5) == train(*twin, first=3, steps=5)  # candidates for growth too
    assert_same(snapshot(*objects), snapshot(*twin))
    smet.load_checkpoint(tmp_path / "a", *objects)
    assert_same(snapshot(*objects), snapshot(*saved))


@pytest.mark.parametrize("name", ["optimizer", "manager", "random states"])
def test_what_is_loaded_later_fails(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, objects = make(), make()
    train(*saved, steps=5)
    smet.save_checkpoint(tmp_path / "a", *saved)
    train(*objects, steps=2)
    random = torch.get_rng_state()

    def after(loads: Callable[..., Any]) -> Callable[..., None]:
        errors = [RuntimeError("late")]  # once: putting things back may load them again

        def load_and_fail(*args: Any, **options: Any) -> None:
            loads(*args, **options)
            if errors:
                raise errors.pop()

        return load_and_fail

    if name == "random states":
        monkeypatch.setattr(checkpoint, "restore_random_states", after(checkpoint.restore_random_states))
    else:
        thing = objects[1 if name == "optimizer" else 2]
        monkeypatch.setattr(type(thing), "load_state_dict", after(type(thing).load_state_dict))
    with Unchanged(*objects), pytest.raises(ValueError, match=r"a: could not be loaded \(late\)"):
        smet.load_checkpoint(tmp_path / "a", *objects)
    assert torch.equal(torch.get_rng_state(), random)
    assert objects[1].state[next(iter(objects[2].sites.values())).values]["step"] == 2


class Versioned(nn.Module):
    """Its tensors meant something else in version 1."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *args: Any) -> None:
        self.loaded_version = metadata.get("version")
        super()._load_from_state_dict(state, prefix, metadata, *args)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["plain", "wrapped"])
def test_modules_see_the_version_they_were_saved_in(wrap: Callable[..., Any], tmp_path: Path) -> None:
    model, other = (nn.Sequential(nn.Linear(2, 2), Versioned()) for _ in range(2))
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    smet.save_checkpoint(tmp_path / "a", wrap(model), torch.optim.SGD(model.parameters(), 0.1))
    smet.load_checkpoint(tmp_path / "a", other, optimizer)
    assert other[1].loaded_version == 2
    saved = checkpoint_file.read(tmp_path / "a")
    saved["model_metadata"]["1"]["version"] = 1
    checkpoint_file.write(tmp_path / "a", saved)
    smet.load_checkpoint(tmp_path / "a", wrap(other), optimizer)
    assert other[1].loaded_version == 1
    for bad, match in (("1", "version.*'1'"), (True, "version.*True"), (-1, "version.*-1"), (None, "version.*None")):
        saved["model_metadata"]["1"]["version"] = bad
        checkpoint_file.write(tmp_path / "a", saved)
        with Unchanged(other), pytest.raises(ValueError, match=match):
            smet.load_checkpoint(tmp_path / "a", other, optimizer)


def cut(states: Any) -> None:
    states["cpu"] = states["cpu"][:-8].clone()


def beyond_the_table(states: Any) -> None:
    """Both counts are within their own ranges; together they lead 623 words behind the table."""
    states["cpu"][8:12] = torch.tensor([624], dtype=torch.int32).view(torch.uint8)
    states["cpu"][16:24] = torch.tensor([624], dtype=torch.int64).view(torch.uint8)


@pytest.mark.parametrize(
    ("alter", "match"),
    [
        (cut, "random.cpu: expected torch.uint8 of shape"),
        (lambda states: states.update(cpu=states["cpu"].short()), "random.cpu"),
        (lambda states: states.update(cpu=torch.full_like(states["cpu"], 255)), "random.cpu.*state of a generator"),
        (lambda states: states.update(cpu=3), "random.cpu"),
        (lambda states: states.pop("cuda"), "random: expected 'cuda'"),
        (lambda states: states.update(cuda=3), "random.cuda: expected a list"),
        (lambda states: states.update(cuda=[torch.ones(16)]), "random.cuda.0"),
        (beyond_the_table, "random.cpu.*within the generator's 624 words"),
    ],
)
def test_random_states_that_cannot_be_restored(alter: Callable[[Any], Any], match: str, tmp_path: Path) -> None:
    objects = make()
    smet.save_checkpoint(tmp_path / "a", *objects)
    saved = checkpoint_file.read(tmp_path / "a")
    alter(saved["random"])
    checkpoint_file.write(tmp_path / "a", saved)
    before = torch.get_rng_state()
    with Unchanged(*objects), pytest.raises(ValueError, match=match):
        smet.load_checkpoint(tmp_path / "a", *objects)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_drawn", [0, 1, 2, 623, 624, 625, 1300])
def test_every_state_of_the_generator_is_taken(num_drawn: int, tmp_path: Path) -> None:
    objects = make()
    torch.manual_seed(0)
    for _ in range(num_drawn):
        torch.randint(10, ())
    smet.save_checkpoint(tmp_path / "a", *objects)
    drawn = torch.rand(5)
    smet.load_checkpoint(tmp_path / "a", *objects)
    assert torch.equal(torch.rand(5), drawn)
