"""Tests all of torch.compile, with code generation: passes are installed, cached, chained with a user's, disabled."""

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from torch import fx, nn

import smet_compile as smet
from smet_compile import passes
from smet_compile.ops import library
from smet_compile.passes.pipeline import install
from tests.passes.compiled import assert_close, randn, train
from tests.support.fresh_process import run_python

WARM_START = Path(__file__).parent / "warm_start.py"


def linear_only() -> nn.Module:
    """Returns a model for which no C++ has to be compiled."""
    model = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 40, bias=False)).double()
    return smet.sparsify(model, 0.5, block_shape=8)


def ops_of(call: Any, model: nn.Module, *inputs: Any) -> set[str]:
    """Returns our ops that a compiled step runs, after checking that it equals the eager one."""
    expected = train(model, model, inputs)
    assert_close(train(call, model, inputs), expected)
    with torch.profiler.profile() as profile:
        actual = train(call, model, inputs)
    assert_close(actual, expected)
    return {event.key for event in profile.key_averages() if event.key.startswith("smet::")}


FUSED = {"smet::masked_matmul", "smet::sampled_matmul"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Resets Dynamo and disables the caches, since with a warm cache no pass would run."""
    torch._dynamo.reset()
    with inductor.patch(force_disable_caches=True):
        yield


def test_topology_updates_do_not_recompile() -> None:
    model = smet.sparsify(nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)).double(), 0.5)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model)
    runs = []
    for each in (model, twin):
        optimizer = smet.ActiveAdamW(each, lr=1e-2)
        runs.append((optimizer, smet.TopologyManager(each, optimizer, total_steps=100, every=2, schedule="cosine")))
    for step in range(7):
        x = randn(5, 16)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            actual = train(compiled, model, (x,))
        assert_close(actual, train(twin, twin, (x,)))
        for optimizer, manager in runs:
            optimizer.step()
            optimizer.zero_grad()
            manager.step()
    assert [len(manager.history) for _, manager in runs] == [3, 3]


def test_sparsify_installs_the_passes() -> None:
    with inductor.patch(joint_custom_pre_pass=None):
        model = linear_only()
        assert ops_of(torch.compile(model, fullgraph=True), model, randn(5, 16)) == FUSED


def test_inference_is_fused() -> None:
    model = linear_only()
    compiled = torch.compile(model)
    with torch.no_grad():
        assert ops_of(compiled, model, randn(5, 16).detach()) == {"smet::masked_matmul"}


def test_max_autotune() -> None:
    model = linear_only()
    assert ops_of(torch.compile(model, mode="max-autotune"), model, randn(5, 16)) == FUSED


@pytest.mark.parametrize("several", [False, True], ids=["pass", "list"])
def test_a_pass_of_the_users_without_uuid_runs_as_well(several: bool) -> None:
    seen: list[fx.Graph] = []
    theirs: Any = [seen.append] if several else seen.append
    with inductor.patch(joint_custom_pre_pass=theirs):
        install()
        model = linear_only()
        assert ops_of(torch.compile(model), model, randn(5, 16)) == FUSED
    assert len(seen) == 1


@pytest.mark.parametrize("how", ["variable", "context manager"])
def test_switched_off_it_is_equal_unfused_and_silent(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear_only()
    compiled = torch.compile(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "smet_compile")
        if how == "variable":
            monkeypatch.setenv(passes.VARIABLE, "0")
            found = ops_of(compiled, model, randn(5, 16))
        else:
            with passes.disabled():
                found = ops_of(compiled, model, randn(5, 16))
    assert found == {"smet::unpack", "smet::pack"}


def test_nobody_is_warned_of_what_was_compiled_while_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = linear_only(), randn(5, 16)
    compiled = torch.compile(model)
    monkeypatch.setattr(library, "on_unseen_graph", lambda: pytest.fail("warned"))
    with passes.disabled():
        train(compiled, model, (x,))
    train(compiled, model, (x,))


def test_warm_start_is_a_cache_hit_and_still_fused_and_the_switch_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cold, warm = (json.loads(run_python(str(WARM_START)).splitlines()[-1]) for _ in range(2))
    assert cold == {"hits": 0, "misses": 1, "passes": 1, "ops": sorted(FUSED)}
    assert warm == {"hits": 1, "misses": 0, "passes": 0, "ops": sorted(FUSED)}
    monkeypatch.setenv(passes.VARIABLE, "0")
    off = json.loads(run_python(str(WARM_START)).splitlines()[-1])
    assert off == {"hits": 0, "misses": 1, "passes": 0, "ops": ["smet::pack", "smet::unpack"]}
