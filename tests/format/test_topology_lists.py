"""Compares the derived lists with a plain reading of the mask."""

import pytest
import torch

from smet_compile.format import Layout, Topology, empty_lists, pack_bits, write_lists

LAYOUTS = [
    Layout((7, 11), (7, 11), (1, 1)),
    Layout((130, 70), (130, 70), (1, 1)),
    Layout((3, 5, 33), (5, 33), (1, 4)),
    Layout((64, 640), (64, 640), (1, 16)),
    Layout((40, 40), (40, 40), (16, 1)),
    Layout((9, 9), (9, 9), (4, 4)),
    Layout((2, 9, 30), (9, 30), (2, 8)),
    Layout((4, 4), (4, 4), (8, 8)),
]


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.shape}-{layout.block_shape}")
def test_lists_say_what_the_mask_says(layout: Layout, density: float) -> None:
    mask = torch.rand(layout.num_blocks, generator=torch.Generator().manual_seed(0)) < density
    active = [position for position, is_active in enumerate(mask.tolist()) if is_active]
    written = empty_lists(layout, len(active), torch.device("cpu")).fill_(-7)
    write_lists(written, pack_bits(mask), layout)
    lists = Topology(layout, pack_bits(mask), written, len(active))
    if not layout.tiles:
        assert layout.single_weights or lists.positions.tolist() == active
        groups = [position // layout.blocks_per_group for position in active]
        expected = [sum(group < g for group in groups) for g in range(layout.num_groups + 1)]
        assert lists.group_starts.tolist() == expected
        assert lists.by_column is lists.rows_by_column is lists.row_starts is lists.column_starts is None
        return
    per_matrix = layout.block_rows * layout.block_cols
    row = [position // layout.block_cols for position in active]
    column = [p // per_matrix * layout.block_cols + p % layout.block_cols for p in active]
    by_column = sorted(range(len(active)), key=lambda n: (column[n], row[n]))
    assert lists.positions.tolist() == active
    assert lists.by_column.tolist() == by_column
    assert lists.rows_by_column.tolist() == [row[n] % layout.block_rows for n in by_column]
    for starts, lines, count in (
        (lists.row_starts, row, layout.num_matrices * layout.block_rows),
        (lists.column_starts, column, layout.num_matrices * layout.block_cols),
    ):
        assert starts.tolist() == [sum(line < number for line in lines) for number in range(count + 1)]


def test_the_index_is_within_its_budget() -> None:
    """Bits and lists take at most 0.16 bytes a dense weight for single weights, 16 bytes a block for tiles."""
    single = Layout((2048, 5461), (2048, 5461), (1, 1))
    num_active = single.num_active(0.25)
    index = empty_lists(single, num_active, torch.device("meta"))
    assert index.nbytes + single.num_blocks / 8 <= 0.16 * single.num_weights
    tiles = Layout((2048, 5461), (2048, 5461), (64, 64))
    num_active = tiles.num_active(0.1)
    index = empty_lists(tiles, num_active, torch.device("meta"))
    assert index.nbytes + tiles.num_blocks / 8 <= 16 * num_active
