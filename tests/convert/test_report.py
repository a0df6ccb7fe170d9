import json

import torch
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites


def make() -> nn.Module:
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20, bias=False), nn.Embedding(7, 30))
    return smet.sparsify(model, density=0.25, block_shape=(4, 4))


def test_rows_are_read_back_from_the_model() -> None:
    model = make()
    report = smet.report(model)
    assert [row.name for row in report.sites] == ["0.weight", "2.weight"]
    for row in report.sites:
        site = find_sites(model)[row.name]
        assert tuple(row.shape) == tuple(site.layout.shape) and tuple(row.block_shape) == (4, 4)
        assert row.num_active == int(site.compact.mask().sum())
        assert row.density == row.num_active / row.num_blocks
        assert row.bytes == site.values.numel() * 4
        assert row.index_bytes >= (row.num_blocks + 7) // 8


def test_totals() -> None:
    model = make()
    report = smet.report(model)
    assert report.num_weights == 40 * 30 + 30 * 20 + 7 * 30
    active = sum(int((module.weight != 0).sum()) for module in (model[0], model[2]))
    assert report.num_active_weights == active + 7 * 30
    assert report.density == report.num_active_weights / report.num_weights
    assert report.values_bytes == sum(row.bytes for row in report.sites)
    assert report.index_bytes == sum(row.index_bytes for row in report.sites)
    assert [row.name for row in report.skipped] == ["3.weight"]


def test_prints_as_a_table_with_every_weight() -> None:
    text = str(smet.report(make()))
    for word in ("0.weight", "2.weight", "3.weight", "density"):
        assert word in text


def test_to_dict_is_json() -> None:
    assert json.loads(json.dumps(smet.report(make()).to_dict()))


def test_index_cost_stays_within_the_format() -> None:
    """An index takes at most 0.16 bytes per dense weight at (1, 1); at most 16 bytes per block for tiles."""
    model = smet.sparsify(nn.Sequential(nn.Linear(512, 512)), density=0.3)
    assert smet.report(model).sites[0].index_bytes <= 0.16 * 512 * 512
    model = smet.sparsify(nn.Sequential(nn.Linear(512, 512)), density=0.3, block_shape=16)
    row = smet.report(model).sites[0]
    assert row.index_bytes <= 16 * row.num_blocks


def test_index_cost_counts_every_buffer() -> None:
    model = smet.sparsify(nn.Sequential(nn.Linear(64, 64)), density=0.3)
    model(torch.randn(2, 64)).sum().backward()
    held = sum(b.numel() * b.element_size() for b in model.buffers())
    assert smet.report(model).sites[0].index_bytes >= held
