"""Pictures never lie: what cells say of random masks, against the dense mask."""

from __future__ import annotations

import numpy as np
from dynamic_strategies import BATCH, HEADS, dynamic_masks, per_head_masks, slot_data
from hypothesis import given
from hypothesis import strategies as st
from strategies import masks, shapes

from maskdsl import Mask, Shape, Where, dense
from maskdsl.cells import Grid, find_sources, measure_cells, parts_of, view_call
from maskdsl.raster import judge

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
