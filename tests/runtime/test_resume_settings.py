"""A run goes on with the settings it began with, unless the caller names those that may differ."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import smet_compile as smet
from smet_compile.runtime import checkpoint_file
from tests.runtime.setting import make
from tests.support.snapshots import assert_same, snapshot
from tests.support.states import Unchanged
from tests.support.training import train

SAVED: dict[str, Any] = {
    "total_steps": 1000,
    "every": 3,
    "drop_fraction": 0.2,
    "final_drop_fraction": 0.005,
    "stop_fraction": 0.75,
    "drop": "magnitude",
    "grow": "random",
    "schedule": "cosine",
    "min_age": None,
    "window": None,
    "ablation_threshold": None,
    "seed": 0,
    "density_schedule": None,
}
OTHER: dict[str, Any] = {
    "total_steps": 60,
    "every": 4,
    "drop_fraction": 0.1,
    "final_drop_fraction": 0.01,
    "stop_fraction": 0.5,
    "drop": "saliency",
    "grow": "gradient",
    "schedule": "linear",
    "min_age": 9,
    "window": 2,
    "seed": 3,
    "density_schedule": [[20, 0.4]],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    objects = make()
    train(*objects, steps=4)
    assert objects[2].state_dict()["settings"] == SAVED
    smet.save_checkpoint(tmp_path / "a", *objects)
    return tmp_path / "a"


@pytest.mark.parametrize("name", list(OTHER))
def test_another_setting_is_refused_by_name(name: str, path: Path) -> None:
    objects = make(**{name: OTHER[name]})
    ours = re.escape(repr(OTHER[name]))
    match = f"{name}: expected {ours} as in this manager, got {SAVED[name]!r} in the saved run.*override"
    with Unchanged(*objects), pytest.raises(ValueError, match=match):
        smet.load_checkpoint(path, *objects)
    with Unchanged(*objects), pytest.raises(ValueError, match=match):
        objects[2].load_state_dict(checkpoint_file.read(path)["manager"])


@pytest.mark.parametrize("name", list(OTHER))
def test_another_setting_is_taken_where_it_may_differ(name: str, path: Path) -> None:
    objects = make(**{name: OTHER[name]})
    smet.load_checkpoint(path, *objects, override=(name,))
    assert objects[2].num_steps == 4 and len(objects[2].history) == 1
    assert objects[2].state_dict()["settings"] == SAVED | {name: OTHER[name]}
    train(*objects, first=4, steps=4)
    assert objects[2].history[1].step == (8 if name == "every" else 6)
    direct = make(**{name: OTHER[name]})[2]
    direct.load_state_dict(checkpoint_file.read(path)["manager"], override=[name])
    assert direct.num_steps == 4


def test_only_what_is_named_may_differ(path: Path) -> None:
    objects = make(every=4, seed=3)
    with Unchanged(*objects), pytest.raises(ValueError, match="seed: expected 3"):
        smet.load_checkpoint(path, *objects, override=("every", "total_steps"))
    smet.load_checkpoint(path, *objects, override=("every", "seed"))


@pytest.mark.parametrize("override", ["evry", ["every", "lr"], ("",), [3]])
def test_an_unknown_name(override: Any, path: Path) -> None:
    objects = make()
    with Unchanged(*objects), pytest.raises(ValueError, match=r"override: expected names of settings.*every"):
        smet.load_checkpoint(path, *objects, override=override)


def test_an_override_without_a_manager(path: Path) -> None:
    with pytest.raises(ValueError, match="override: expected a manager"):
        smet.load_checkpoint(path, make()[0], override=("every",))


def test_a_setting_that_an_older_file_does_not_have_is_not_compared(path: Path) -> None:
    state = checkpoint_file.read(path)["manager"]
    del state["settings"]["seed"]
    make(seed=3)[2].load_state_dict(state)
    del state["settings"]
    make(every=7)[2].load_state_dict(state)


def test_a_setting_that_nobody_knows(path: Path) -> None:
    objects, saved = make(), checkpoint_file.read(path)
    saved["manager"]["settings"]["momentum"] = 3
    with Unchanged(*objects), pytest.raises(ValueError, match=r"settings: got 'momentum'.*upgrade"):
        objects[2].load_state_dict(saved["manager"])


def test_numpy_numbers_are_the_numbers_they_are(path: Path) -> None:
    import numpy as np

    smet.load_checkpoint(path, *make(total_steps=np.int64(1000), stop_fraction=np.float32(0.75)))


def test_settings_cannot_be_changed_afterwards() -> None:
    manager = make(grow="gradient")[2]
    assert manager.settings["grow"] == "gradient"
    manager.settings["grow"] = "random"
    assert manager.settings["grow"] == "gradient"


def with_event(**changes: Any) -> Callable[[Any], None]:
    return lambda state: state["history"][0].update(changes)


def with_site(**changes: Any) -> Callable[[Any], None]:
    return lambda state: state["history"][0]["sites"]["0.weight"].update(changes)


def with_bits(part: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Any], None]:
    def alter(state: Any) -> None:
        if part == "grown":
            state["trace"][part]["0.weight"][0][1] = change(state["trace"][part]["0.weight"][0][1])
        else:
            state["trace"][part]["0.weight"] = change(state["trace"][part]["0.weight"])

    return alter


BAD: list[tuple[Callable[[Any], Any], str]] = [
    (lambda state: state.pop("history"), "manager: expected 'history'"),
    (lambda state: state.pop("num_postponed"), "manager: expected 'num_postponed'"),
    (lambda state: state.update(more=1), "manager: got 'more'.*upgrade"),
    (lambda state: state.update(settings=3), "settings: expected a dict"),
    (lambda state: state["settings"].update(policy="x"), "settings: got 'policy'.*upgrade"),
    (lambda state: state["settings"].update(seed=False), "seed: expected 0"),
    (lambda state: state["settings"].update(stop_fraction=float("nan")), "stop_fraction.*nan"),
    (lambda state: state.update(num_steps=-7), "num_steps: expected an integer"),
    (lambda state: state.update(num_steps=True), "num_steps.*True"),
    (lambda state: state.update(num_steps=4.0), "num_steps.*4.0"),
    (lambda state: state.update(num_steps="4"), "num_steps.*'4'"),
    (lambda state: state.update(num_steps=10**30), "num_steps.*64 bits"),
    (lambda state: state.update(num_steps=2), r"history\[0\].step.*from 1 to 2, got 3"),
    (lambda state: state.update(num_postponed=10), "num_postponed.*from 0 to 9"),
    (lambda state: state.update(history={}), "history: expected a list"),
    (lambda state: state["history"].append(5), r"history\[1\]: expected a dict"),
    (lambda state: state["history"].append(copy.deepcopy(state["history"][0])), r"history\[1\].step"),
    (with_event(step=0), "step"),
    (with_event(step=float("nan")), "step"),
    (with_event(drop_fraction=float("nan")), "drop_fraction"),
    (with_event(drop_fraction="0.2"), "drop_fraction"),
    (with_event(sites=[]), "sites"),
    (with_event(sites={"0.weight": {"bad": 1}}), "num_blocks"),
    (with_event(more=1), "more"),
    (lambda state: state["history"][0]["sites"].update(other={}), "other"),
    (with_site(num_active=1), "num_active"),
    (with_site(num_dropped=-1), "num_dropped"),
    (with_site(num_newcomers_dropped=100), "num_newcomers_dropped"),
    (with_site(num_surviving="x"), "num_surviving"),
    (with_site(num_blocks=3), "num_blocks"),
    (with_site(mean_age=-1.0), "mean_age"),
    (with_site(num_explored=None), "num_explored"),
    (lambda state: state.update(trace=[]), "trace: expected a dict"),
    (lambda state: state["trace"].update(grown=3), "trace.grown: expected a dict"),
    (lambda state: state["trace"]["explored"].pop("0.weight"), "0.weight.*same weights"),
    (lambda state: state["trace"]["grown"].update(other=[]), "other.*same weights"),
    (lambda state: state["trace"]["grown"].update({"0.weight": [[5, torch.zeros(30)]]}), "step of grown blocks"),
    (lambda state: state["trace"]["grown"].update({"0.weight": [3]}), "pairs"),
    (with_bits("initial", torch.zeros_like), "0 initial blocks"),
    (with_bits("grown", lambda bits: 3), "0.weight.*30.*bytes"),
    (with_bits("grown", lambda bits: bits[:-1]), "0.weight.*30.*bytes"),
    (with_bits("explored", lambda bits: bits.short()), "0.weight.*30.*bytes"),
    (with_bits("explored", torch.zeros_like), "0 explored blocks"),
    (with_bits("grown", lambda bits: torch.full_like(bits, 255)), "240 grown blocks"),
]


@pytest.mark.parametrize(("alter", "match"), BAD, ids=[match for _, match in BAD])
def test_what_no_manager_has_is_refused(alter: Callable[[Any], Any], match: str, path: Path) -> None:
    saved, objects = checkpoint_file.read(path), make()
    alter(saved["manager"])
    with Unchanged(*objects), pytest.raises(ValueError, match=match):
        objects[2].load_state_dict(saved["manager"])
    checkpoint_file.write(path, saved)
    with Unchanged(*objects), pytest.raises(ValueError, match=f"a: .*{match}"):
        smet.load_checkpoint(path, *objects)


def test_bits_behind_the_last_block(tmp_path: Path) -> None:
    """(3, 3) tiles of a (7, 20) weight are 21 blocks in three bytes: three bits are nobody's."""
    objects = make(block_shape=(3, 3))
    train(*objects, steps=4)
    smet.save_checkpoint(tmp_path / "a", *objects)
    name = "3.parametrizations.weight.0.topology"
    for part in ("explored", "grown", "model"):
        saved, other = checkpoint_file.read(tmp_path / "a"), make(block_shape=(3, 3))
        bits = saved["model"][name] if part == "model" else saved["manager"]["trace"][part]["3.weight"]
        bits = bits[0][1] if part == "grown" else bits
        place = int(bits.nonzero()[0])
        bits[place] &= bits[place] - 1  # one block less, so that the count stays
        bits[-1] |= 128
        checkpoint_file.write(tmp_path / "altered", saved)
        with Unchanged(*other), pytest.raises(ValueError, match=r"3\.weight.*zeros"):
            smet.load_checkpoint(tmp_path / "altered", *other)


def test_loading_is_what_was_saved(path: Path) -> None:
    objects, again = make(), make()
    smet.load_checkpoint(path, *objects)
    again[2].load_state_dict(objects[2].state_dict())
    assert_same(snapshot(again[2]), snapshot(objects[2]))
