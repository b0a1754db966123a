"""Tiles at a picture's resolution: which share of each cell's tiles is FULL, which MASKED."""

from __future__ import annotations

import numpy as np

from maskdsl.cells import (
    PAIRS_AT_ONCE,
    SAMPLES,
    Grid,
    measure_cells,
    parts_of,
    settle,
    split_boxes,
    view_call,
)
from maskdsl.expr import Mask
from maskdsl.grains import grains_of
from maskdsl.heads import pick_head
from maskdsl.raster import Bools, Box, Ints, View, judge
from maskdsl.shape import Shape
from maskdsl.shares import Shares

TILES = 1 << 21  # looked at in a picture; where there are more, some stand for all


def measure_tiles(mask: Mask, grid: Grid, view: View,
                  tile: tuple[int, int]) -> tuple[Shares, Shares, Bools]:
    """(full, masked, some): shares of the tiles of every cell, float64[H, W], and where a MASKED
    tile is, bool[H, W].

    tile  (queries, keys), in tokens; the grid's borders lie on multiples of it

    FULL tiles have only live pairs, MASKED ones may have some; both by bounds, of parts of a tile
    where they are needed, which never call a tile with a live pair dead. All tiles are looked at
    where cells hold up to 8 x 8 of them or two million are open; else the shares are taken from 64
    or 16 tiles of a cell, and `some` from all of it.
    """
    mask = pick_head(mask, view.head)
    may, sure = judge(mask, grid.box(view.shape.q_offset), view)
    full, masked = sure.astype(np.float64), np.zeros(grid.shape)
    ys, xs = np.nonzero(may & ~sure)
    samples = pick_samples(grid, tile, len(ys))
    rows, used_rows = _tiles(grid.rows, tile[0], samples, 1)
    keys, used_keys = _tiles(grid.keys, tile[1], samples, 2)
    step = max(1, PAIRS_AT_ONCE // samples**2)
    for i in range(0, len(ys), step):
        y, x = ys[i:i + step], xs[i:i + step]
        used = used_rows[y][:, :, None] & used_keys[x][:, None, :]
        some, all_ = judge_tiles(mask, _box(rows[y], keys[x], tile, view), used, view)
        full[y, x] = (all_ & used).sum((1, 2)) / used.sum((1, 2))
        masked[y, x] = (some & ~all_ & used).sum((1, 2)) / used.sum((1, 2))
    cells = measure_cells(mask, grid, view)
    if cells.unsure.any():
        cells = settle(cells, [measure_cells(part, grid, view) for _, part in parts_of(mask)])
    return full, masked, (cells.live & ~cells.unsure & (full < 1)) | (masked > 0)


def pick_samples(grid: Grid, tile: tuple[int, int], open_cells: int) -> int:
    """How many tiles of a cell are looked at along each side."""
    each = [int((-(-np.diff(edges) // size)).max(initial=1))
            for edges, size in ((grid.rows, tile[0]), (grid.keys, tile[1]))]
    if open_cells * max(each)**2 <= TILES:
        return max(each)
    return SAMPLES if max(each) <= SAMPLES or open_cells * SAMPLES**2 <= TILES else SAMPLES // 2


def judge_tiles(mask: Mask, box: Box, used: Bools, view: View) -> tuple[Bools, Bools]:
    """(may, sure) of tiles; those that are `used` and not decided are looked at in parts, where the
    mask's formulas jump inside a tile."""
    may, sure = judge(mask, box, view)
    doubtful = may & ~sure & used
    if any(grains_of(mask)) and doubtful.any():
        may = may.copy()
        may[doubtful] = split_boxes(mask, box.take(doubtful), view, evenly=False)[0]
    return may, sure


def _tiles(edges: Ints, size: int, samples: int, seed: int) -> tuple[Ints, Bools]:
    """First tokens of up to `samples` tiles of each cell, int64[cells, samples], and which of them
    count."""
    first, count = edges[:-1], -(-np.diff(edges) // size)
    step, size_of_part = np.arange(samples), count[:, None] / samples
    jitter = np.random.default_rng(seed).random((len(count), samples))  # else diagonals are in step
    spread = ((step + jitter) * size_of_part).astype(np.int64)
    many = count[:, None] > samples
    chosen = np.minimum(np.where(many, spread, step), count[:, None] - 1)
    return first[:, None] + chosen * size, many | (step < count[:, None])


def _box(rows: Ints, keys: Ints, tile: tuple[int, int], view: View) -> Box:
    """The tiles as boxes of absolute positions, cut to the call."""
    shape = view.shape
    row_ends = np.minimum(rows + tile[0], shape.q_len) - 1
    key_ends = np.minimum(keys + tile[1], shape.kv_len) - 1
    return Box(rows[:, :, None] + shape.q_offset, row_ends[:, :, None] + shape.q_offset,
               keys[:, None, :], key_ends[:, None, :])


def count_tile_shares(mask: Mask, length: int, tile: int = 128) -> tuple[float, float]:
    """Shares of FULL and of MASKED tiles in a square call, as `measure_tiles` finds them in
    128 x 128 cells."""
    grid = Grid.over((0, length), (0, length), 128, 128, (tile, tile))
    shape = Shape(length, length)
    full, masked, _ = measure_tiles(mask, grid, view_call(mask, shape), (tile, tile))
    tiles = [-(-np.diff(edges) // tile) for edges in (grid.rows, grid.keys)]
    weight = tiles[0][:, None] * tiles[1][None, :]
    return (float((full * weight).sum() / weight.sum()),
            float((masked * weight).sum() / weight.sum()))
