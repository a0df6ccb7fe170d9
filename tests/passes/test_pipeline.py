"""Tests the pipeline as Inductor sees it: its order, its uuid, and a user's passes before it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch._inductor.config as inductor
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

import smet_compile
from smet_compile import passes
from smet_compile.passes import pipeline
from smet_compile.passes.pipeline import PASSES, JointPasses, install, source_hash

ROOM = Path(smet_compile.__file__).parent


class Named(CustomGraphPass):
    """Is a user's pass."""

    def __init__(self, name: Any, calls: list[Any] | None = None) -> None:
        self.name = name
        self.calls = [] if calls is None else calls

    def __call__(self, graph: fx.Graph) -> None:
        self.calls.append(self.name)

    def uuid(self) -> Any:
        return self.name


def plain(graph: fx.Graph) -> None:
    pass


def test_order() -> None:
    assert [each.__name__ for each in PASSES] == [
        "recompute_unpack",
        "lower_convolutions",
        "canonicalize",
        "fuse_masked_matmul",
        "fuse_sampled_matmul",
        "fuse_update",
        "verify",
    ]


@pytest.mark.parametrize("changed", ["passes/canonicalize.py", "ops/matmul.py", "format/blocks.py", "passes/new.py"])
def test_uuid_changes_with_the_source(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = tmp_path / "smet_compile"
    shutil.copytree(ROOM, copied)
    monkeypatch.setattr(pipeline, "__file__", str(copied / "passes" / "pipeline.py"))
    assert source_hash.__wrapped__() == source_hash()
    with (copied / changed).open("a") as file:
        file.write("# more\n")
    assert source_hash.__wrapped__() != source_hash()


def test_uuid_is_the_same_for_the_same() -> None:
    assert JointPasses().uuid() == JointPasses().uuid() is not None
    assert JointPasses((Named("a"),)).uuid() == JointPasses((Named("a"),)).uuid() is not None


def test_uuid_changes_with_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    on = JointPasses().uuid()
    with passes.disabled():
        assert JointPasses().uuid() != on
    assert JointPasses().uuid() == on
    monkeypatch.setenv(passes.VARIABLE, "0")
    assert JointPasses().uuid() != on


def test_uuid_changes_with_the_passes_before_and_their_order() -> None:
    a, b = Named("a"), Named("b")
    found = [JointPasses(before).uuid() for before in [(), (a,), (b,), (a, b), (b, a)]]
    assert len(set(found)) == 5


@pytest.mark.parametrize("before", [(plain,), (Named("a"), plain), (Named(None),)], ids=["plain", "both", "none"])
def test_no_uuid_where_a_pass_before_has_none(before: tuple[Any, ...]) -> None:
    assert JointPasses(before).uuid() is None


def test_passes_before_run_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(pipeline, "run_passes", lambda graph: calls.append("ours"))
    JointPasses((Named("a", calls), Named("b", calls)))(fx.Graph())
    assert calls == ["a", "b", "ours"]


def test_passes_before_run_though_ours_are_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(pipeline, "run_passes", lambda graph: calls.append("ours"))
    with passes.disabled():
        JointPasses((Named("a", calls),))(fx.Graph())
    assert calls == ["a"]


def test_switch_nests() -> None:
    with passes.disabled():
        with passes.disabled():
            assert not passes.is_enabled()
        assert not passes.is_enabled()
    assert passes.is_enabled()


@pytest.mark.parametrize(
    "current",
    [None, Named("a"), plain, (Named("a"), plain), [Named("a")]],
    ids=["none", "one", "plain", "tuple", "list"],
)
def test_install_chains_behind_what_is_there(current: Any) -> None:
    with inductor.patch(joint_custom_pre_pass=current):
        install()
        ours = inductor.joint_custom_pre_pass
        assert isinstance(ours, JointPasses)
        several = list(current) if isinstance(current, tuple | list) else [] if current is None else [current]
        assert list(ours.before) == several


def test_installed_twice_is_installed_once() -> None:
    with inductor.patch(joint_custom_pre_pass=Named("a")):
        install()
        first = inductor.joint_custom_pre_pass
        install()
        assert inductor.joint_custom_pre_pass is first
        inductor.joint_custom_pre_pass = [first, plain]
        install()
        assert inductor.joint_custom_pre_pass == [first, plain]
