"""Tests how results are shown in notebooks, and that their rows are right with pandas and without it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smet_compile as smet
from smet_compile.convert.report import DenseReport, Report
from smet_compile.notebook import frame_of, html_lines, html_table, html_text, html_view
from smet_compile.plan.report import Cost
from smet_compile.plan.stored import KINDS

Rows = list[dict[str, Any]]


class Cells(HTMLParser):
    """Reads the tables of a page: a list of rows each, of the texts of their cells; and the entries of its lists."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.entries: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "li":
            self.entries.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self._open[-1] == "li":
            self.entries[-1] += data


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    return smet.sparsify(layers, 0.5, block_shape=(1, 4), exclude="2.*")


def trained(model: nn.Module, inputs: Tensor) -> smet.TopologyManager:
    optimizer = smet.ActiveAdamW(model, lr=1e-2)
    manager = smet.TopologyManager(model, optimizer, total_steps=16, every=3, drop_fraction=0.3, auto_step=False)
    for _ in range(7):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        manager.step()
    return manager


def test_text_is_escaped_in_every_part() -> None:
    evil = '<script>alert("&amp;")</script>'
    page = html_view(evil, html_table([evil], [[evil]]), html_lines([evil]), html_text(evil))
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&quot;&amp;amp;&quot;)&lt;/script&gt;") == 5
    assert Cells(page).tables == [[[evil], [evil]]]
    report = Report([], [DenseReport(evil, (2, 3), 6, 24, evil)], 6, 6)
    assert Cells(report._repr_html_()).tables[-1][1] == [evil, "2x3", evil]


def test_a_table_of_ragged_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="longer"):
        html_table(["a", "b"], [["1"]])


def test_a_report_shows_the_cells_of_its_text(model: nn.Module) -> None:
    report = smet.report(model)
    compact, dense = Cells(report._repr_html_()).tables
    lines = str(report).splitlines()
    assert [row[0] for row in compact] == ["weight", "0.weight", "4.weight"]
    assert [" ".join(row) for row in compact] == [" ".join(line.split()) for line in lines[:3]]
    assert dense[1:] == [["2.weight", "16x16", "excluded"]]
    rows = records(report)
    assert [(row["name"], row["num_active"], row["dense_reason"]) for row in rows] == [
        ("0.weight", 24, None),
        ("4.weight", 16, None),
        ("2.weight", None, "excluded"),
    ]
    assert sum(row["bytes"] for row in rows) == report.values_bytes + report.dense_bytes


def test_an_explanation_shows_the_kernels_and_the_reasons(model: nn.Module) -> None:
    explanation = smet.explain(model, torch.randn(4, 12))
    page = Cells(explanation._repr_html_())
    (table,) = page.tables
    assert [" ".join(row) for row in table] == [" ".join(line.split()) for line in str(explanation).splitlines()[:3]]
    assert page.entries == str(explanation).splitlines()[3:]
    rows = records(explanation)
    assert [row["forward_kernel"] for row in rows] == [site.kernels.get("forward") for site in explanation.sites]
    assert rows[0]["forward"] == "fused" and rows[0]["input_gradient"] == "none"


def test_an_inspection_shows_its_rows(model: nn.Module) -> None:
    inspection = smet.inspect(model, torch.randn(4, 12))
    page = Cells(inspection._repr_html_())
    assert page.tables == [[list(row) for row in inspection.rows]]
    assert page.entries == inspection.summary[1:]
    rows = records(inspection)
    assert [row["density"] for row in rows] == [0.5, 0.5]
    assert [row["num_dead_inputs"] for row in rows] == [site.num_dead_inputs for site in inspection.sites]


def test_a_plan_shows_its_rows_and_counts_bytes() -> None:
    def cost(weights: int) -> Cost:
        return Cost(dict.fromkeys(KINDS, 0) | {"weights": weights, "index": 7}, 10, 20, weights + 20, 1e6)

    plan = smet.Plan("a title", 0.25, 2, None, cost(100), cost(400), warnings=("a & b",))
    page = Cells(plan._repr_html_())
    assert page.tables[0][1:] == [list(row) for row in plan.rows()]
    assert page.entries == [plan.legend(), "warning: a & b"]
    rows = {row["name"]: row for row in records(plan)}
    assert list(rows) == ["weights", "index", "persistent", "activations", "working", "peak", "operations"]
    assert (rows["weights"]["sparse"], rows["peak"]["dense"], rows["persistent"]["sparse"]) == (100, 420, 107)


def test_a_manager_shows_what_each_update_did(model: nn.Module) -> None:
    manager = trained(model, torch.randn(8, 12))
    page = manager._repr_html_()
    assert "2 topology updates in 7 steps, the next after step 9" in page
    (table,) = Cells(page).tables
    assert [row[0] for row in table[1:]] == [str(event.step) for event in manager.history] == ["3", "6"]
    rows = records(manager)
    assert [row["num_dropped"] for row in rows] == [event.num_dropped for event in manager.history]
    assert rows[0]["num_dropped"] > 0 and rows[0]["num_added"] == rows[0]["num_dropped"]


def test_a_manager_prints_its_progress(model: nn.Module) -> None:
    manager = trained(model, torch.randn(8, 12))
    progress = "2 topology updates in 7 steps, the next after step 9"
    assert repr(manager) == f"TopologyManager({len(manager.sites)} compact weights: {progress})"


def test_a_manager_without_updates_has_no_table(model: nn.Module) -> None:
    manager = smet.TopologyManager(model, smet.ActiveAdamW(model), total_steps=12, schedule="none")
    page = manager._repr_html_()
    assert "0 topology updates in 0 steps, none to come" in page
    assert Cells(page).tables == [] and records(manager) == []


@pytest.mark.parametrize("make", [smet.report, lambda model: smet.inspect(model)], ids=["report", "inspection"])
def test_rows_are_a_data_frame_with_pandas(make: Callable[[nn.Module], Any], model: nn.Module) -> None:
    pandas = pytest.importorskip("pandas")
    frame = make(model).to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["name"])[:2] == ["0.weight", "4.weight"]
    assert frame["density"].iloc[0] == 0.5


def test_a_broken_pandas_is_not_taken_for_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(name: str) -> None:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr("smet_compile.notebook.import_module", breaks)
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        frame_of([{"a": 1}])


def test_a_compact_layer_prints_its_density_and_blocks(model: nn.Module) -> None:
    assert "CompactWeight(density=0.5, block_shape=(1, 4), shape=(16, 12), num_active=24)" in str(model)
    fan_in = smet.sparsify(nn.Linear(16, 8), 0.25, pattern="fan_in")
    assert "num_active=32, pattern='fan_in'" in repr(fan_in)


def test_printing_a_model_reads_no_data() -> None:
    with torch.device("meta"):
        model = smet.sparsify(nn.Linear(16, 8), 0.25)
    assert "density=0.25" in str(model)


def records(result: Any) -> Rows:
    """Returns the rows of a result on a machine without pandas."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pandas", None)
        rows = result.to_pandas()
    assert type(rows) is list
    return rows
