"""Tiles at a picture's resolution: which share of each cell's tiles is FULL, which MASKED."""

from __future__ import annotations

import numpy as np

from maskdsl.cells import PAIRS_AT_ONCE, SAMPLES, Grid, Shares, measure_cells, view_call
from maskdsl.expr import Mask
from maskdsl.heads import pick_head
from maskdsl.raster import Bools, Box, Ints, View, judge
from maskdsl.shape import Shape


def measure_tiles(mask: Mask, grid: Grid, view: View,
                  tile: tuple[int, int]) -> tuple[Shares, Shares, Bools]:
    """(full, masked, some): shares of the tiles of every cell, float64[H, W], and where a MASKED
    tile is, bool[H, W].

    tile  (queries, keys), in tokens; the grid's borders lie on multiples of it

    FULL tiles have only live pairs, MASKED ones may have some; both by bounds, which never call a
    tile with a live pair dead. Exact for cells of up to 8 x 8 tiles; beyond, the shares are taken
    from 64 tiles of a cell, and `some` from all of it.
    """
    mask = pick_head(mask, view.head)
    may, sure = judge(mask, grid.box(view.shape.q_offset), view)
    full, masked = sure.astype(np.float64), np.zeros(grid.shape)
    ys, xs = np.nonzero(may & ~sure)
    rows, used_rows = _tiles(grid.rows, tile[0])
    keys, used_keys = _tiles(grid.keys, tile[1])
    step = max(1, PAIRS_AT_ONCE // SAMPLES**2)
    for i in range(0, len(ys), step):
        y, x = ys[i:i + step], xs[i:i + step]
        used = used_rows[y][:, :, None] & used_keys[x][:, None, :]
        box = _box(rows[y], keys[x], tile, view)
        some, all_ = judge(mask, box, view)
        full[y, x] = (all_ & used).sum((1, 2)) / used.sum((1, 2))
        masked[y, x] = (some & ~all_ & used).sum((1, 2)) / used.sum((1, 2))
    live = measure_cells(mask, grid, view).live
    return full, masked, (live & (full < 1)) | (masked > 0)


def _tiles(edges: Ints, size: int) -> tuple[Ints, Bools]:
    """First tokens of up to 8 tiles of each cell, int64[cells, 8], and which of them count."""
    first, count = edges[:-1], -(-np.diff(edges) // size)
    step = np.arange(SAMPLES)
    spread = step * count[:, None] // SAMPLES
    many = count[:, None] > SAMPLES
    chosen = np.where(many, spread, np.minimum(step, count[:, None] - 1))
    return first[:, None] + chosen * size, many | (step < count[:, None])


def _box(rows: Ints, keys: Ints, tile: tuple[int, int], view: View) -> Box:
    """The tiles as boxes of absolute positions, cut to the call."""
    shape = view.shape
    row_ends = np.minimum(rows + tile[0], shape.q_len) - 1
    key_ends = np.minimum(keys + tile[1], shape.kv_len) - 1
    return Box(rows[:, :, None] + shape.q_offset, row_ends[:, :, None] + shape.q_offset,
               keys[:, None, :], key_ends[:, None, :])


def count_tile_shares(mask: Mask, length: int, tile: int = 128) -> tuple[float, float]:
    """Shares of FULL and of MASKED tiles in a square call; of more than 128 x 128 cells of tiles,
    from 64 tiles a cell."""
    grid = Grid.over((0, length), (0, length), 128, 128, (tile, tile))
    shape = Shape(length, length)
    full, masked, _ = measure_tiles(mask, grid, view_call(mask, shape), (tile, tile))
    tiles = [-(-np.diff(edges) // tile) for edges in (grid.rows, grid.keys)]
    weight = tiles[0][:, None] * tiles[1][None, :]
    return (float((full * weight).sum() / weight.sum()),
            float((masked * weight).sum() / weight.sum()))
