import math
import re
from pathlib import Path

import pytest
import torch

import smet_compile as smet
from smet_compile.pretrain.config import RunConfig, resolve
from smet_compile.pretrain.loop import pretrain
from smet_compile.pretrain.memory import BYTE_KINDS, measure
from smet_compile.pretrain.metrics import of_kind, read_metrics
from smet_compile.pretrain.training import build_training, train_step
from tests.pretrain.runs import SMALL_MODEL, moves, small_config

pytestmark = SMALL_MODEL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    pretrain(small_config(root), root / "run")
    return root / "run"


def test_a_run_folder_holds_all_its_parts(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    plots = {"loss.png", "churn.png", "bytes.png"}
    assert names == {"config.json", "metrics.jsonl", "checkpoint.safetensors", "report.md"} | plots
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in plots)
    assert all(f"]({name})" in (folder / "report.md").read_text() for name in plots)


def test_the_report_says_what_was_measured(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    loss = of_kind(read_metrics(folder / "metrics.jsonl"), "eval")[-1]["loss"]
    assert f"| validation perplexity (per token) | {math.exp(loss):.4f} |" in text
    assert f"| validation bits per byte | {loss / math.log(2):.4f} |" in text
    assert all(f"| {kind} |" in text for kind in BYTE_KINDS)
    rows = re.findall(r"^\| (\d+) \| 0\.\d{4} \| [\d,]+ \|", text, re.MULTILINE)
    assert [int(step) for step in rows] == [event["step"] for event in moves(folder)]
    assert "| density | 0.3 |" in text


def measured(config: RunConfig) -> dict[str, dict]:
    training = build_training(config, 256)
    batch = torch.randint(256, (1, 2, 32))
    train_step(training, batch)
    assert all(parameter.grad is None for parameter in training.model.parameters())
    return {"training": training, **measure(training, config, 256)}


def test_bytes_of_dense_adamw_are_sixteen_a_weight() -> None:
    found = measured(resolve(preset="nano", method="dense", device="cpu", eager=True))
    counts = found["all"]
    assert counts["run"] == counts["dense"]
    assert sum(counts["dense"][kind] for kind in BYTE_KINDS[:3]) == 16 * counts["num_weights"]
    assert found["sparse"]["num_weights"] == 0


@pytest.mark.parametrize("block", ["1", "16"])
def test_bytes_of_sparse_layers_are_those_of_their_tensors(block: str) -> None:
    found = measured(resolve(preset="nano", block=block, density=0.25, device="cpu", eager=True))
    counts, report = found["sparse"], smet.report(found["training"].model)
    assert counts["num_weights"] == sum(math.prod(site.shape) for site in report.sites)
    run = counts["run"]
    assert run["weights"] == run["gradients"] == run["moments"] / 2 == report.values_bytes
    assert run["index"] == report.index_bytes
    blocks = sum(site.num_active for site in report.sites)
    assert blocks < run["ages"] < blocks + 3000 * len(report.sites)
    assert counts["dense"]["moments"] == 8 * counts["num_weights"]


def test_bytes_of_8_bit_moments_are_two_a_weight_and_their_scales() -> None:
    found = measured(resolve(preset="nano", moment_dtype="int8", density=0.25, device="cpu", eager=True))
    report = smet.report(found["training"].model)
    num_active, scales = report.values_bytes // 4, sum(-(-math.prod(site.shape) // 1024) for site in report.sites)
    assert found["sparse"]["run"]["moments"] == 2 * num_active + 8 * scales


def test_a_run_without_updates_says_so(tmp_path: Path) -> None:
    pretrain(small_config(tmp_path, method="static", steps=2), tmp_path / "run")
    assert "The topology did not change" in (tmp_path / "run" / "report.md").read_text()
    assert not (tmp_path / "run" / "churn.png").exists()
