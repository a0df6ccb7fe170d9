"""torchtitan's Trainer trains sparse: with FSDP and tensor parallelism, and resumes bit for bit.

torchtitan 0.3.0 needs an older `datasets` than the other tests, so these run in an environment of their own
(docs/torchtitan.md says how to make it), and are skipped elsewhere.
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import distributed

from tests.integrations.titan_run import STEPS, give_a_device, small_sparse
from tests.support.fresh_process import ROOT

pytestmark = pytest.mark.skipif(find_spec("torchtitan") is None, reason="torchtitan is not installed")

NEEDS_NEWER_TORCH = pytest.mark.skipif(
    not hasattr(distributed, "set_timeout"),
    reason="fully_shard of this torch takes no plain tensors beside a mesh of all",
)
SLABS = {f"*.{name}": (2, 0) for name in ("wq", "wk", "wv", "w1", "w3")} | {"*.wo": (2, 1), "*.w2": (2, 1)}


def run(world: int, folder: Path, *options: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what came of several runs, one after the other, by ``world`` processes."""
    folder.mkdir(exist_ok=True)
    port = 20000 + os.getpid() % 20000
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    common = {"PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    command = [sys.executable, "-m", "tests.integrations.titan_run", str(folder), json.dumps(options)]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=280)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors[0][-4000:]
    results: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return results


def test_a_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, resumed = run(1, tmp_path / "one", {"folder": "a"}, {"folder": "a", "load": 3})
    assert resumed["digest"] == whole["digest"] and resumed["losses"] == whole["losses"][3:]
    assert whole["updates"] == resumed["updates"] == [2, 4] and whole["total_steps"] == STEPS
    assert whole["densities"] == [pytest.approx(0.4, abs=0.01)] * STEPS
    assert len(whole["zeros"]) == 14 and "lm_head.weight" not in whole["zeros"]
    assert all(fraction == pytest.approx(0.6, abs=0.01) for fraction in whole["zeros"].values())


@pytest.mark.slow
def test_checkpointing_and_the_other_backend_change_nothing(tmp_path: Path) -> None:
    plain, checkpointed, other = run(
        1,
        tmp_path / "one",
        {"folder": "a"},
        {"folder": "b", "checkpointing": True},
        {"folder": "c", "backend": "spmd_types"},
    )
    assert checkpointed["digest"] == plain["digest"] and checkpointed["losses"] == plain["losses"]
    assert other["losses"] == pytest.approx(plain["losses"], rel=1e-6)  # gradient norms add up in another order


@pytest.mark.slow
@pytest.mark.parametrize(
    ("here", "alone"),
    [
        ({}, {}),
        pytest.param({"backend": "spmd_types"}, {}, marks=NEEDS_NEWER_TORCH),
        ({"sparse": {"grow": "gradient"}}, {"sparse": {"grow": "gradient"}}),
        ({"tp": 2}, {"sparse": {"slabs": SLABS}}),
    ],
    ids=["fsdp", "fsdp_spmd_types", "fsdp_gradient", "tensor_parallel"],
)
def test_two_processes_are_as_one(here: dict[str, Any], alone: dict[str, Any], tmp_path: Path) -> None:
    (whole,) = run(2, tmp_path / "two", {"folder": "a", **here})
    (resumed,) = run(2, tmp_path / "two", {"folder": "a", "load": 3, **here})
    (one,) = run(1, tmp_path / "one", {"folder": "a", **alone})
    assert whole["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert whole["updates"] == one["updates"] == [2, 4]
    assert resumed["digest"] == whole["digest"] and resumed["losses"] == whole["losses"][3:]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    give_a_device(monkeypatch.setattr)


@pytest.mark.usefixtures("environment")
def test_a_registry_of_ones_own_is_found_by_its_module() -> None:
    from torchtitan.config import ConfigManager

    from smet_compile.integrations.torchtitan import SparseMetrics, SparseOptimizers

    arguments = ["--module", "tests.integrations.titan_run", "--config", "small_sparse", "--training.steps", "9"]
    config = ConfigManager().parse_args(arguments)
    assert isinstance(config.optimizer, SparseOptimizers.Config) and isinstance(config.metrics, SparseMetrics.Config)
    assert [group.optimizer_name for group in config.optimizer.param_groups] == ["ActiveAdamW"]
    assert config.training.steps == 9


@pytest.mark.usefixtures("environment")
def test_mistakes_are_named() -> None:
    from smet_compile.integrations.torchtitan import _check_parallelism, sparse_training

    config = small_sparse()
    with pytest.raises(ValueError, match="evry: expected an option of sparsify or TopologyManager"):
        sparse_training(config, 0.3, evry=3)
    config.optimizer.param_groups[0].optimizer_name = "DistMuon"
    with pytest.raises(ValueError, match="expected groups of Adam, AdamW or ActiveAdamW, got DistMuon"):
        sparse_training(config, 0.3)
    config.optimizer.param_groups[0].optimizer_name, config.model_spec = "AdamW", None
    with pytest.raises(ValueError, match="model_spec: expected the model of the run, got None"):
        sparse_training(config, 0.3)
    for wrong, message in (
        ({"pp": 2}, "expected data and tensor parallelism, got pp=2"),
        ({"ep": 4}, "expected data and tensor parallelism, got ep=4"),
        ({"spmd_backend": "full_dtensor"}, "expected one of partial_dtensor, spmd_types, got full_dtensor"),
    ):
        dims = {"pp": 1, "ep": 1, "cp": 1, "spmd_backend": "spmd_types"} | wrong
        with pytest.raises(ValueError, match=re.escape(message)):
            _check_parallelism(SimpleNamespace(**dims))
