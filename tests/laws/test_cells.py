"""Pictures never lie: what cells say of random masks, against the dense mask."""

from __future__ import annotations

import numpy as np
from dynamic_strategies import BATCH, HEADS, dynamic_masks, per_head_masks, slot_data
from hypothesis import given
from hypothesis import strategies as st
from strategies import masks, shapes

from maskdsl import Causal, LastQ, Mask, RandomBlocks, Shape, Sink, Where, Window, dense
from maskdsl.cells import Grid, find_sources, measure_cells, parts_of, view_call
from maskdsl.dynamic import slots_of
from maskdsl.grains import split_range
from maskdsl.heads import pick_head
from maskdsl.raster import is_opaque, judge
from maskdsl.shares import ROWS
from maskdsl.spans import spans
from maskdsl.tile_cells import measure_tiles

SIDES = st.tuples(st.integers(1, 9), st.integers(1, 9))


def boxes_of(live: np.ndarray, grid: Grid) -> list[list[np.ndarray]]:
    return [[live[a:b, c:d] for c, d in zip(grid.keys, grid.keys[1:], strict=False)]
            for a, b in zip(grid.rows, grid.rows[1:], strict=False)]


def check(live: np.ndarray, grid: Grid, mask: Mask, view: object) -> None:
    """Bounds never contradict the pairs; counted cells are counted right."""
    parts = boxes_of(live, grid)
    some = np.array([[part.any() for part in row] for row in parts]).reshape(grid.shape)
    all_ = np.array([[part.all() for part in row] for row in parts]).reshape(grid.shape)
    may, sure = judge(mask, grid.box(view.shape.q_offset), view)
    assert not (some & ~may).any()
    assert not (sure & ~all_).any()
    cells = measure_cells(mask, grid, view)
    small = (np.diff(grid.rows)[:, None] <= 8) & (np.diff(grid.keys) <= 8)
    share = np.array([[part.mean() for part in row] for row in parts]).reshape(grid.shape)
    assert np.allclose(cells.share[small], share[small])
    assert (cells.live[small] == some[small]).all()
    if not any(isinstance(node, Where) for node in mask.walk()):
        assert not (some & ~cells.live).any()
    assert not (cells.full & ~all_).any()
    assert (all_ | (cells.share <= 1)).all()
    assert not (cells.unsure & ~(cells.live & (cells.share == 0))).any()
    if not is_opaque(mask) and not slots_of(mask) and all(
            p.is_exact for p in spans(pick_head(mask, view.head))):
        few = np.diff(grid.rows) <= ROWS
        assert np.allclose(cells.share[few], share[few])
        assert (cells.live[few] == some[few]).all()


@given(masks(), shapes(70), SIDES)
def test_cells_of_random_masks(mask: Mask, shape: Shape, sides: tuple[int, int]) -> None:
    if not shape.q_len or not shape.kv_len:
        return
    grid = Grid.over((0, shape.q_len), (0, shape.kv_len), *sides)
    try:
        view = view_call(mask, shape)
        live = dense(mask, shape)[0, 0].numpy()
    except ValueError:  # longer than a BlockDiagonal
        return
    check(live, grid, mask, view)


@given(st.data())
def test_cells_of_call_time_data(data: st.DataObject) -> None:
    mask = data.draw(st.one_of(dynamic_masks(), per_head_masks()))
    shape = data.draw(shapes(70))
    if not shape.q_len or not shape.kv_len:
        return
    slots = data.draw(slot_data(mask, shape))
    batch, head = BATCH - 1, HEADS - 1
    try:
        live = dense(mask, shape, BATCH, HEADS, slots=slots)[batch, head].numpy()
    except ValueError:  # data too short, as the oracle says too
        return
    view = view_call(mask, shape, batch, head, HEADS, slots)
    grid = Grid.over((0, shape.q_len), (0, shape.kv_len), *data.draw(SIDES))
    check(live, grid, mask, view)


@given(masks(4), shapes(40))
def test_a_cell_of_one_pair_names_an_operand_that_keeps_it(mask: Mask, shape: Shape) -> None:
    if not shape.q_len or not shape.kv_len:
        return
    grid = Grid.over((0, shape.q_len), (0, shape.kv_len), 64, 64)
    try:
        live = dense(mask, shape)[0, 0].numpy()
    except ValueError:
        return
    sources = find_sources(mask, grid, view_call(mask, shape))
    assert ((sources.owner >= 0) == live).all()
    parts = np.stack([dense(part, shape)[0, 0].numpy() for _, part in parts_of(mask)])
    kept = np.take_along_axis(parts, np.maximum(sources.owner, 0)[None], 0)[0]
    assert (kept == live).all()


@given(st.integers(1, 9), st.integers(1, 3), st.integers(60, 160), SIDES)
def test_a_formula_that_jumps_inside_cells_is_decided(block: int, count: int, length: int,
                                                      sides: tuple[int, int]) -> None:
    """Cells cross borders of random blocks, and yet none is called live that holds nothing."""
    mask, shape = Causal() & (RandomBlocks(block, count) | Window(3)), Shape(length, length)
    live = dense(mask, shape)[0, 0].numpy()
    grid = Grid.over((0, length), (0, length), 8 * sides[0], 8 * sides[1])
    cells = measure_cells(mask, grid, view_call(mask, shape))
    some = np.array([[part.any() for part in row] for row in boxes_of(live, grid)])
    crossed = [np.diff(edges) // block for edges in (grid.rows, grid.keys)]
    few = (crossed[0][:, None] < 7) & (crossed[1] < 7)
    assert (cells.live[few] == some[few]).all()
    assert not cells.unsure[few].any()


def test_tiles_that_random_blocks_leave_out_are_not_drawn() -> None:
    mask, shape = Causal() & (RandomBlocks(24, 2) | Sink(5)), Shape(960, 960)
    live = dense(mask, shape)[0, 0].numpy()
    grid = Grid.over((0, 960), (0, 960), 30, 30, (32, 32))
    full, masked, some = measure_tiles(mask, grid, view_call(mask, shape), (32, 32))
    parts = boxes_of(live, grid)
    assert ((full + masked > 0) == [[part.any() for part in row] for row in parts]).all()
    assert (some == [[part.any() and not part.all() for part in row] for row in parts]).all()


def test_shares_of_large_cells_are_counted_where_intervals_decide() -> None:
    mask, shape = Causal() & (Sink(4) | Window(200) | LastQ(30)), Shape(4000, 4000)
    grid = Grid.over((0, 4000), (0, 4000), 10, 10)
    share = measure_cells(mask, grid, view_call(mask, shape)).share
    live = dense(mask, shape)[0, 0].numpy().reshape(10, 400, 10, 400).mean((1, 3))
    assert np.abs(share - live).max() < 2e-3
    assert np.abs(share.mean() - live.mean()) < 1e-5


@given(st.integers(0, 500), st.integers(0, 90), st.integers(1, 30), st.integers(0, 29))
def test_ranges_are_split_where_formulas_jump(low: int, size: int, grain: int, shift: int) -> None:
    ends = np.array([low]), np.array([low + size])
    first, last, fits = split_range(*ends, ((grain, shift % grain),), 8)
    numbers = {(x + shift % grain) // grain for x in range(low, low + size + 1)}
    assert fits[0] == (len(numbers) <= 8)
    covered = {x for a, b in zip(first[0], last[0], strict=True) for x in range(a, b + 1)}
    assert covered == set(range(low, low + size + 1))
    if fits[0]:
        assert all((a + shift % grain) // grain == (b + shift % grain) // grain
                   for a, b in zip(first[0], last[0], strict=True))
