"""The plots show what the records and topologies say."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from smet_compile.pretrain.comparison import differences, read_runs
from smet_compile.pretrain.folder import write_config
from smet_compile.pretrain.plots import draw_fates, draw_plots, fate_of
from smet_compile.pretrain.topology_plots import picture_of
from tests.pretrain.runs import small_config


def update(step: int, **counts: int) -> dict[str, Any]:
    site = {"num_dropped": 0, "num_grown": 0, "num_grown_earlier": 0, "num_surviving_earlier": 0} | counts
    return {"step": step, "sites": {"a": site, "b": dict.fromkeys(site, 0)}}


UPDATES = [
    update(10, num_dropped=9),
    update(20, num_dropped=6, num_grown=9),
    update(30, num_dropped=4, num_grown=6, num_grown_earlier=9, num_surviving_earlier=5),
]


def test_the_fate_of_blocks_is_known_two_updates_later() -> None:
    assert [fate_of(UPDATES, number, ["a", "b"]) for number in range(3)] == [(9, 5), (6, None), (4, None)]
    assert fate_of(UPDATES, 0, ["b"]) == (0, 0)


def test_bars_stack_to_what_was_grown() -> None:
    axes = Figure().subplots()
    draw_fates(axes, [10, 20, 30], [(9, 5), (6, None), (4, None)])
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert heights == {"stayed": [5, 0, 0], "dropped again": [4, 0, 0], "too young to tell": [0, 6, 4]}
    assert axes.get_ylim()[1] > 9 and axes.containers[0][0].get_width() == 8


def test_records_of_older_versions_lack_the_counts(tmp_path: Path) -> None:
    event = {"step": 5, "sites": {"a": {"churn_fraction": 0.2, "grown_survival_fraction": None}}}
    assert "churn.png" not in draw_plots([{"kind": "topology", "step": 5, "event": event}], tmp_path)


@pytest.mark.parametrize(
    ("shape", "block", "cells", "words"),
    [
        ((8, 64), (16, 16), (8, 64), "blocks"),
        ((128, 352), (1, 1), (16, 16), "density of areas of 8 x 22"),
        ((2048, 4096), (1, 1), (32, 64), "density of areas of 64 x 64"),
        ((2048, 128), (1, 32), (32, 64), "density of areas of 64 x 64"),
        ((3, 100), (1, 1), (3, 17), "density of areas of 1 x 6"),
    ],
)
def test_many_blocks_are_drawn_as_densities_of_areas(
    shape: tuple[int, int], block: tuple[int, int], cells: tuple[int, int], words: str
) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.25
    drawn, found = picture_of((mask, *block))
    assert (tuple(drawn.shape), found) == (cells, words)
    assert math.isclose(float(drawn.mean()), float(mask.float().mean()), abs_tol=0.02)


def test_two_runs_of_other_models_differ_by_their_names(tmp_path: Path) -> None:
    for name in ("gpt2", "llama"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.json").write_text(f'{{"model_type": "{name}"}}')
        write_config(tmp_path / name / "config.json", small_config(tmp_path, model=str(tmp_path / f"{name}.json")))
    assert differences(read_runs([tmp_path / "gpt2", tmp_path / "llama"])) == ["model: gpt2 (gpt2); llama (llama)"]
