"""`--log` sends a run's numbers to a tracker, goes on where the run does, and never ends a run."""

import io
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from smet_compile.presets import MissingExtraError
from smet_compile.pretrain.loop import pretrain, resume
from smet_compile.pretrain.metrics import of_kind, read_metrics
from tests.pretrain.runs import SMALL_MODEL, StopAfter, losses, small_config

pytestmark = SMALL_MODEL


class FakeTrackio(ModuleType):
    """Takes what the real module takes by its public functions."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.__spec__ = ModuleSpec("trackio", None)
        self.runs: list[dict[str, Any]] = []
        self.points: list[tuple[int, dict[str, float]]] = []
        self.num_finished = 0

    def init(self, **options: Any) -> None:
        self.runs.append(options)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.points.append((step, metrics))

    def finish(self) -> None:
        self.num_finished += 1

    def curve(self, name: str) -> list[tuple[int, float]]:
        return [(step, numbers[name]) for step, numbers in self.points if name in numbers]


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> FakeTrackio:
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    return fake


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_numbers_are_those_of_the_records_and_of_the_manager(tmp_path: Path, trackio: FakeTrackio) -> None:
    config = small_config(tmp_path, log="trackio")
    pretrain(config, tmp_path / "run", console=quiet())
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert trackio.curve("train/loss") == [(r["step"], r["loss"]) for r in of_kind(records, "train")]
    assert trackio.curve("eval/loss") == [(r["step"], r["loss"]) for r in of_kind(records, "eval")]
    assert [step for step, _ in trackio.curve("smet/density")] == [r["step"] for r in of_kind(records, "topology")]
    assert trackio.curve("smet/churn_fraction")[0][1] == of_kind(records, "topology")[0]["event"]["churn_fraction"]
    assert trackio.curve("bytes/weights") and trackio.runs[0]["config"]["steps"] == 12 and trackio.num_finished == 1


def test_a_run_goes_on_under_its_name(tmp_path: Path, trackio: FakeTrackio) -> None:
    config = small_config(tmp_path, log="trackio")
    pretrain(config, tmp_path / "run", StopAfter(5), quiet())
    assert resume(tmp_path / "run", console=quiet())
    first, second = trackio.runs
    assert first["name"] == second["name"] and second["resume"] == "allow"
    assert [step for step, _ in trackio.curve("train/loss")] == list(range(1, 13))


def test_a_tracker_that_fails_is_named_once_and_the_run_goes_on(
    tmp_path: Path, trackio: FakeTrackio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(trackio, "log", fail)
    with pytest.warns(UserWarning, match=r"--log trackio: nothing more is sent there \(no route to host\)") as caught:
        assert pretrain(small_config(tmp_path, log="trackio"), tmp_path / "run", console=quiet())
    assert len([each for each in caught if "--log" in str(each.message)]) == 1
    assert len(losses(tmp_path / "run")) == 14


def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(MissingExtraError, match="trackio is needed for this but not installed; run: pip install track"):
        pretrain(small_config(tmp_path, log="trackio"), tmp_path / "run", console=quiet())
    assert not (tmp_path / "run").exists()


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small_config(tmp_path, log="tensorboard", save_every=4)
    pretrain(config, tmp_path / "run", StopAfter(6), quiet())
    (tmp_path / "run" / "checkpoint.safetensors").unlink()  # it begins anew, as after a lost checkpoint
    assert resume(tmp_path / "run", console=quiet())
    shown = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    expected = [(step, loss) for kind, step, loss in losses(tmp_path / "run") if kind == "train"]
    found = {event.step: event.value for event in shown.Scalars("train/loss")}
    assert found == pytest.approx(dict(expected), rel=1e-6)
    assert "smet/explored_fraction" in shown.Tags()["scalars"] and "smet/density" in shown.Tags()["scalars"]


def test_wandb_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert pretrain(small_config(tmp_path, log="wandb"), tmp_path / "run", console=quiet())
    (stored,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    content = stored.read_bytes()
    assert all(name in content for name in (b"train/loss", b"eval/perplexity", b"smet/density"))
