"""`inspect RUN` prints its table, draws its plots and names mistakes; `pretrain` warns about dead units."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner, Result

import smet_compile as smet
from smet_compile.pretrain.cli import make_app
from smet_compile.pretrain.inspection import inspect_run, print_inspection, short_names
from smet_compile.pretrain.loop import pretrain, resume
from tests.pretrain.runs import SMALL_MODEL, StopAfter, moves, small_config

pytestmark = SMALL_MODEL
IMAGES = ("topology_maps.png", "ages.png", "topology_churn.png")


def call(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(make_app(), ["inspect", str(folder), *options])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a finished run."""
    folder = tmp_path_factory.mktemp("inspected")
    config = small_config(folder, density=0.2, block="2", schedule="cosine")
    pretrain(config, folder / "run", console=Console(file=io.StringIO()))
    return folder / "run"


@pytest.fixture(scope="module")
def found(run: Path) -> smet.Inspection:
    return inspect_run(run)[0]


def test_a_run_is_printed_and_drawn(run: Path) -> None:
    result = call(run, "--wide")
    assert result.exit_code == 0, result.output
    assert re.search(r"model\.layers\.1\.mlp\.down_proj\.weight +32x88 +0\.2", result.output)
    assert re.search(r"input-output paths alive: a share of 10\^-\d", result.output)
    assert result.output.rstrip().endswith(f"Plots in {run}: {', '.join(IMAGES)}")
    for name in IMAGES:
        assert (run / name).read_bytes().startswith(b"\x89PNG")


def test_80_columns_hold_a_row_for_each_layer(run: Path, found: smet.Inspection) -> None:
    head, *rows = call(run).output.splitlines()[: 1 + len(found.sites)]
    assert head.split() == ["layer", "density", "dead", "units", "effective", "churn"]
    assert rows[0].split()[0] == "0.self_attn.q_proj" and len(rows) == 14 and max(map(len, rows)) <= 80
    site = found["model.layers.1.mlp.down_proj.weight"]
    num_dead = site.num_dead_inputs + site.num_dead_outputs
    assert rows[-1].split()[:3] == ["1.mlp.down_proj", f"{site.density:.4f}", f"{num_dead}/120"]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["model.layers.0.q.weight", "model.layers.1.q.weight"], ["0.q", "1.q"]),
        (["a.weight", "b.weight"], ["a", "b"]),
        (["model.a.weight"], ["a"]),
        (["m.experts.gate_up_proj", "m.experts.down_proj"], ["gate_up_proj", "down_proj"]),
        ([], []),
    ],
)
def test_names_are_as_short_as_they_may_be(names: list[str], short: list[str]) -> None:
    assert list(short_names(names).values()) == short


def test_the_last_checkpoint_is_inspected(run: Path, found: smet.Inspection) -> None:
    for site in found.sites:
        assert site.history.churn == tuple((e["step"], e["sites"][site.name]["churn_fraction"]) for e in moves(run))
        assert site.history.explored_fraction == moves(run)[-1]["sites"][site.name]["explored_fraction"]
    assert sum(found.age_counts.values()) == sum(site.num_active for site in found.sites)
    assert max(found.age_counts) == 12


def test_on_a_terminal_it_is_a_table(found: smet.Inspection, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr("smet_compile.pretrain.console.Console", lambda: console)
    print_inspection(found)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "┃" in shown and "0.self_attn.q_proj" in shown and "paths alive" in shown
    assert max(len(Text.from_ansi(line)) for line in shown.splitlines()) <= 80


def test_a_run_that_was_stopped_before_any_update(tmp_path: Path) -> None:
    pretrain(small_config(tmp_path), tmp_path / "run", StopAfter(1), Console(file=io.StringIO()))
    result = call(tmp_path / "run")
    assert result.exit_code == 0 and "churn" not in result.output.splitlines()[0]
    assert not (tmp_path / "run" / "topology_churn.png").exists()


def test_mistakes_are_named(tmp_path: Path) -> None:
    assert "RUN: expected the folder of a run" in call(tmp_path).stderr
    pretrain(small_config(tmp_path, method="dense"), tmp_path / "run", StopAfter(1), Console(file=io.StringIO()))
    result = call(tmp_path / "run")
    assert result.exit_code == 2 and "RUN: expected a sparse run, got a dense one" in result.stderr
    pretrain(small_config(tmp_path), tmp_path / "other", StopAfter(1), Console(file=io.StringIO()))
    (tmp_path / "other" / "checkpoint.safetensors").unlink()
    assert "RUN: expected a checkpoint" in call(tmp_path / "other").stderr


def warnings_in(output: io.StringIO) -> list[str]:
    return [line for line in output.getvalue().splitlines() if line.startswith("warning: ")]


def warnings_of(tmp_path: Path, **changes: object) -> list[str]:
    output = io.StringIO()
    pretrain(small_config(tmp_path, **changes), tmp_path / "run", StopAfter(5), Console(file=output))
    return warnings_in(output)


def test_pretrain_warns_once_of_each_layer_with_dead_units_and_again_when_it_goes_on(tmp_path: Path) -> None:
    found = warnings_of(tmp_path, density=0.1, block="8", every=1, schedule="cosine")
    assert "self_attn.q_proj.weight" in found[0] and "without an active weight; a higher --density" in found[0]
    named = re.findall(r"model\.\S+\.weight", " ".join(found))
    assert len(named) == len(set(named))
    output = io.StringIO()
    resume(tmp_path / "run", StopAfter(3), Console(file=output))
    assert "self_attn.q_proj.weight" in warnings_in(output)[0]


def test_pretrain_says_nothing_where_every_unit_lives(tmp_path: Path) -> None:
    assert warnings_of(tmp_path, density=0.6) == []
