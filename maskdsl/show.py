"""Masks as text: characters for docstrings, shades and colours for terminals."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from maskdsl.cells import (
    Grid,
    Range,
    Sources,
    call_shape,
    check_range,
    find_sources,
    mean_share,
    view_call,
)
from maskdsl.dense import dense
from maskdsl.errors import PictureError
from maskdsl.expr import Mask
from maskdsl.raster import View
from maskdsl.shape import Shape

SHADES = "░▒▓"  # up to a third, two thirds, below one; dead is ·, full is █
ANSI = (34, 33, 32, 31, 35, 36, 93, 90)  # one for each colour of the palette
MARGIN = 12  # columns of a terminal that the row numbers take
WIDEST = 96  # characters of a picture


def draw_text(mask: Mask, q_len: int, kv_len: int | None = None) -> str:
    """`#` for a live pair, `·` for a dead one; one line a query row."""
    live = dense(mask, Shape(q_len, q_len if kv_len is None else kv_len))[0, 0]
    return "\n".join("".join("#" if x else "·" for x in row) for row in live.tolist())


def draw_terminal(mask: Mask, q_len: int | None = None,  # noqa: PLR0913, options by name
                  kv_len: int | None = None, *,
                  q_offset: int | None = None, total_len: int | None = None, batch: int = 0,
                  head: int = 0, heads: int | None = None,
                  slots: Mapping[str, object] | None = None, width: int | None = None,
                  colour: bool | None = None, rows: Range | None = None,
                  keys: Range | None = None) -> str:
    """The mask in Unicode at a terminal's resolution, for any length.

    q_len, kv_len  tokens; default: a length at which the mask's own sizes can be seen
    head, heads    which head of how many (PerHead, or slots with data for each head)
    rows, keys     (first, last + 1) to draw a part: query rows of the call, keys
    slots          the call-time data of every slot, by name
    width          characters; default: what fits the terminal, at most 96
    colour         a colour for each operand of the union; default: if the output is a terminal and
                   NO_COLOR is not set

    A cell is `·` where no pair is live, `█` where all are, `░▒▓` between. Errors: ShapeError,
    MissingSlotError, PictureError.
    """
    shape = call_shape(mask, q_len, kv_len, q_offset, total_len)
    if colour is None:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    columns = min(WIDEST, shutil.get_terminal_size().columns - MARGIN) if width is None else width
    if columns < 1 or not shape.q_len or not shape.kv_len:
        raise PictureError(f"a picture {columns} characters wide of {shape.q_len} x "
                           f"{shape.kv_len} pairs", "there is nothing to draw",
                           "mask.show(64, width=64)")
    rows, keys = check_range("rows", rows, shape.q_len), check_range("keys", keys, shape.kv_len)
    q_len, kv_len = rows[1] - rows[0], keys[1] - keys[0]
    longest = max(q_len, kv_len)
    high, wide = max(1, columns * q_len // (2 * longest)), max(1, columns * kv_len // longest)
    if longest <= columns:
        high, wide = q_len, kv_len  # one character a pair
    grid = Grid.over(rows, keys, high, wide)
    view = view_call(mask, shape, batch, head, heads, slots)
    sources = find_sources(mask, grid, view)
    return "\n".join([*_head(mask, view, grid, sources), *_rows(grid, sources, colour),
                      *_legend(sources, colour)])


def _head(mask: Mask, view: View, grid: Grid, sources: Sources) -> list[str]:
    rows, keys = (int(np.diff(edges).max()) for edges in (grid.rows, grid.keys))
    shape, share = view.shape, 100 * mean_share(sources.cells, grid)
    each = "one pair" if rows == keys == 1 else f"{rows:,} x {keys:,} pairs"
    (a, b), (c, d) = grid.whole
    part = f"{shape.q_len:,} queries x {shape.kv_len:,} keys"
    if (b - a, d - c) != (shape.q_len, shape.kv_len):
        part = (f"queries {a:,} to {b - 1:,} of {shape.q_len:,}, keys {c:,} to {d - 1:,} of "
                f"{shape.kv_len:,}")
    lines = [repr(mask), f"{part}, {share:.3g} % live; a character is {each}"]
    if view.heads > 1:
        lines.append(f"head {view.head} of {view.heads}")
    return lines


def _rows(grid: Grid, sources: Sources, colour: bool) -> list[str]:
    """One line a row of cells, with the first query of every fourth line before it."""
    lines = []
    places = [f"{row:,}" for row in grid.rows[:-1].tolist()]
    margin = max(map(len, places))
    for y, place in enumerate(places):
        shares, owners = sources.cells.share[y], sources.owner[y]
        cells = [_cell(*cell) for cell in zip(shares, owners, sources.cells.full[y], strict=True)]
        text = _paint(cells, owners.tolist()) if colour else "".join(cells)
        lines.append(f"{place if y % 4 == 0 else '':>{margin}} {text}")
    return lines


def _cell(share: float, owner: int, full: bool) -> str:
    if owner < 0:
        return "·"
    return "█" if full else SHADES[min(2, int(share * 3))]


def _paint(cells: list[str], owners: list[int]) -> str:
    """The cells with colours, one escape for each run of an owner."""
    borders = [0, *(i for i in range(1, len(cells)) if owners[i] != owners[i - 1]), len(cells)]
    return "".join(_coloured("".join(cells[a:b]), owners[a]) for a, b in pairwise(borders))


def _coloured(text: str, owner: int) -> str:
    code = 90 if owner < 0 else ANSI[owner % len(ANSI)]
    return f"\x1b[{code}m{text}\x1b[0m"


def _legend(sources: Sources, colour: bool) -> list[str]:
    if len(sources.names) == 1 or not colour:
        return []
    return ["", *(f"{_coloured('█', i)} {name}" for i, name in enumerate(sources.names))]
