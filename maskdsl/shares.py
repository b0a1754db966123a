"""How much of each cell of a picture is live, where intervals decide: counted, not sampled."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from maskdsl.dynamic import slots_of
from maskdsl.expr import Mask
from maskdsl.shape import Shape
from maskdsl.spans import Piece, spans
from maskdsl.tiles import Ints, guard_rows, names_of, row_intervals, unite_intervals

ROWS = 16  # rows looked at in each stretch of rows; a stretch that has no more is counted exactly
PAIRS_AT_ONCE = 1 << 21
Shares = npt.NDArray[np.float64]


def count_shares(mask: Mask, rows: Ints, keys: Ints, shape: Shape,
                 head: int = 0) -> tuple[Shares, npt.NDArray[np.bool_]] | None:
    """(live pairs over all pairs of every cell, float64[H, W], whether exact, bool[H]); None where
    no intervals decide, or call-time data does. The mask is traceable.

    rows, keys  borders of the cells, int64[H + 1] of query rows and int64[W + 1]

    Keys are counted. Of many rows, ROWS are looked at between any two borders of cells or of
    classes of rows, in the middle of equal parts, and stand for the others: bounds that are lines
    leave errors of a part in ROWS only where they cross a border of keys.
    """
    pieces = spans(mask)
    if slots_of(mask) or not all(piece.is_exact for piece in pieces):
        return None
    places, weights, exact = spread_rows(rows, pieces, shape)
    found = np.zeros((len(rows) - 1, len(keys) - 1))
    names = names_of(shape, 0, head, mask)
    cell = np.searchsorted(rows, places, side="right") - 1
    step = max(1, PAIRS_AT_ONCE // len(keys))
    for i in range(0, len(places) if pieces else 0, step):
        part = slice(i, i + step)
        kept = count_keys(pieces, places[part] + shape.q_offset, keys, shape, head, names)
        np.add.at(found, cell[part], weights[part, None] * kept)
    areas = np.diff(rows)[:, None] * np.diff(keys)[None, :]
    return found / np.maximum(areas, 1), exact


def count_keys(pieces: tuple[Piece, ...], p: Ints, keys: Ints, shape: Shape, head: int,
               names: dict[str, Any]) -> Ints:
    """Live keys of rows `p` between neighbouring borders `keys`, int64[len(p), len(keys) - 1]."""
    lo, hi = unite_intervals([row_intervals(piece, p, shape, head, names) for piece in pieces])
    kept = np.zeros((len(p), len(keys) - 1), dtype=np.int64)
    for first, last in zip(lo, hi, strict=True):
        kept += np.diff(np.clip(keys[None, :], first[:, None], last[:, None]), axis=1)
    return kept


def spread_rows(rows: Ints, pieces: tuple[Piece, ...],
                shape: Shape) -> tuple[Ints, Shares, npt.NDArray[np.bool_]]:
    """(query rows, how many each stands for, whether all rows of each cell are among them)."""
    edges = [row for piece in pieces for row in guard_rows(piece, shape)
             if rows[0] < row < rows[-1]]
    borders = np.unique(np.concatenate([rows, np.array(edges, dtype=np.int64)]))
    size = np.diff(borders)
    count = np.minimum(size, ROWS)
    of = np.repeat(np.arange(len(size)), count)
    number = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
    places = borders[of] + ((2 * number + 1) * size[of]) // (2 * count[of])
    cell = np.searchsorted(rows, borders[:-1], side="right") - 1
    exact = np.ones(len(rows) - 1, dtype=bool)
    exact[cell[size > ROWS]] = False
    return places, size[of] / count[of], exact
