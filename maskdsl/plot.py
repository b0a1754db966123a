"""Masks as pictures: PNG, SVG or PDF with matplotlib, at any length.

A picture has a fixed number of cells, and each is decided by bounds (`maskdsl.cells`), so a call of
a million tokens takes as long as one of a thousand. Needs matplotlib: `pip install maskdsl[plot]`.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from maskdsl.cells import (
    PALETTE,
    Cells,
    Grid,
    Range,
    call_shape,
    check_range,
    find_sources,
    mean_share,
    view_call,
)
from maskdsl.errors import PictureError
from maskdsl.expr import Mask
from maskdsl.heads import count_heads
from maskdsl.raster import View
from maskdsl.shape import Shape
from maskdsl.tile_cells import measure_tiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WAYS = ("source", "token", "tile")
FAINTEST = 0.35  # tint of a cell with a single live pair; 1 where all are live
UNSURE = 0.12  # of a cell of which only so much is known that it may hold one
MOST_UNEQUAL = 8  # longer side over the shorter one, of a picture drawn to scale
TILE_COLOURS = {"FULL": "#0072b2", "MASKED": "#e69f00"}


def new_figure(width: float, height: float) -> Figure:
    """A figure (inches) that notebooks draw, and that no other plotting state knows of."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PictureError("a picture without matplotlib", "it is not installed",
                           "pip install 'maskdsl[plot]', or mask.show()") from error

    class Picture(Figure):
        """A matplotlib figure that shows itself in a notebook."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    figure = Picture(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure


def plot_mask(mask: Mask, q_len: int | None = None,  # noqa: PLR0913, options by name
              kv_len: int | None = None, *,
              by: str = "source", q_offset: int | None = None, total_len: int | None = None,
              batch: int = 0, head: int | None = None, heads: int | None = None,
              slots: Mapping[str, object] | None = None, rows: Range | None = None,
              keys: Range | None = None, tile: tuple[int, int] = (128, 128), cells: int = 384,
              path: str | Path | None = None) -> Figure:
    """Draw the mask of one call; returns the matplotlib figure.

    q_len, kv_len        tokens; default: a length at which the mask's own sizes can be seen
    by                   "source": colour tells which operand of the union keeps most of a cell;
                         "token": the share of live pairs; "tile": FULL, MASKED and skipped tiles
    q_offset, total_len  as in a call of the compiled mask
    head, heads, batch   which head and batch entry; without `head`, a mask with PerHead is drawn as
                         a grid of its heads
    slots                the call-time data of every slot, by name
    rows, keys           (first, last + 1) to draw a part: query rows of the call, keys
    tile                 (queries, keys) of a tile, for by="tile"
    cells                cells along the longer side
    path                 also write a PNG, SVG or PDF file

    Cells are tinted by the share of their pairs that is live, at least faintly where one is. Which
    pairs those are is decided by bounds, so that a thin line shows at any length. Shares are
    counted where intervals decide; where they do not, those of cells larger than 8 x 8 are taken
    from 64 of their pairs. A cell of which bounds only say that some pair may be live (of a formula
    that jumps many times inside it) is the palest.
    Errors: PictureError, ShapeError, MissingSlotError.
    """
    if by not in WAYS:
        raise PictureError(f"by={by!r}", "unknown way to colour", ' or '.join(
            f"by={way!r}" for way in WAYS))
    if head is None and count_heads(mask) is not None:
        from maskdsl.plot_grid import plot_masks

        return plot_masks([mask], q_len, kv_len, by=by, slots=slots, batch=batch, tile=tile,
                          path=path, q_offset=q_offset, total_len=total_len)
    shape = call_shape(mask, q_len, kv_len, q_offset, total_len)
    view = view_call(mask, shape, batch, head or 0, heads, slots)
    figure = new_figure(6.4, 6.4)
    axes = figure.subplots()
    legend: dict[str, str] = {}
    draw_axes(axes, mask, view, by, check_range("rows", rows, shape.q_len),
              check_range("keys", keys, shape.kv_len), tile, cells, legend)
    axes.set(xlabel="key", ylabel="query")
    axes.set_title(shorten(repr(mask), 70, 4), fontsize=9, loc="left", pad=18)
    add_legend(figure, legend)
    return finish(figure, path)


def draw_axes(axes: Axes, mask: Mask, view: View, by: str, rows: Range, keys: Range,
              tile: tuple[int, int], cells: int, legend: dict[str, str]) -> None:
    """Draw one panel; `legend`, name -> colour, gets what this panel adds to it."""
    longest = max(rows[1] - rows[0], keys[1] - keys[0])
    shortest = min(rows[1] - rows[0], keys[1] - keys[0])
    square = longest <= MOST_UNEQUAL * shortest  # else both sides are drawn as long
    high, wide = (max(1, cells * (b - a) // longest) if square else min(cells, b - a)
                  for a, b in (rows, keys))
    grid = Grid.over(rows, keys, high, wide, tile if by == "tile" else (1, 1))
    if by == "tile":
        full, masked, some = measure_tiles(mask, grid, view, tile)
        legend |= TILE_COLOURS
        image = blend([(TILE_COLOURS["FULL"], full, full > 0),
                       (TILE_COLOURS["MASKED"], masked, some)])
        told = f"{percent(full.mean())} of tiles FULL, {percent(masked.mean())} MASKED"
    else:
        sources = find_sources(mask, grid, view)
        image = paint(sources.cells, sources.owner, sources.names, by, legend)
        told = f"{percent(mean_share(sources.cells, grid))} of pairs live"
        if sources.cells.unsure.any():
            told += "; palest: perhaps some"
    axes.imshow(image, interpolation="nearest", extent=(keys[0], keys[1], rows[1], rows[0]),
                aspect="equal" if square else "auto")
    mark_tokens(axes, rows, keys)
    for spine in axes.spines.values():  # beside the picture: the first keys are often the point
        spine.set(position=("outward", 2), linewidth=0.5, edgecolor="0.6")
    axes.text(1, 1.015, told, transform=axes.transAxes, ha="right", va="bottom", fontsize=7,
              color="0.35")


def percent(share: float) -> str:
    """0.0201  -->  2.01 %."""
    return f"{100 * share:.3g} %"


def shorten(text: str, width: int, lines: int) -> str:
    """The text in at most `lines` lines of `width` characters."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" ..."))


def paint(cells: Cells, owner: npt.NDArray[np.int64], names: tuple[str, ...], by: str,
          legend: dict[str, str]) -> npt.NDArray[np.float64]:
    """The picture rgb[H, W, 3]; a name has one colour in all panels of a legend."""
    if by == "token":
        owner, names = np.where(owner >= 0, 0, -1), ("live pairs",)
    for name in names:
        legend.setdefault(name, PALETTE[len(legend) % len(PALETTE)])
    return blend([(legend[name], np.where(owner == i, cells.share, 0.0), owner == i)
                  for i, name in enumerate(names)], cells.unsure)


def blend(layers: list[tuple[str, Any, Any]], pale: Any = False) -> npt.NDArray[np.float64]:
    """rgb[H, W, 3] on white from (colour, share, whether any) layers, mixed by their shares.

    pale  where nothing is known but that some pair may be live
    """
    from matplotlib.colors import to_rgb

    shape = layers[0][1].shape
    mixed, weights, shares, live = np.zeros((*shape, 3)), np.zeros(shape), np.zeros(shape), False
    for colour, share, some in layers:
        weight = np.where(some, share + 1e-9, 0.0)
        mixed += weight[..., None] * np.asarray(to_rgb(colour))
        weights, shares, live = weights + weight, shares + np.where(some, share, 0.0), live | some
    tint = np.where(live, FAINTEST + (1 - FAINTEST) * np.minimum(shares, 1.0), 0.0)
    tint = np.where(pale & (tint > 0), UNSURE, tint)[..., None]
    image: npt.NDArray[np.float64] = 1 - tint + tint * mixed / np.maximum(weights, 1e-12)[..., None]
    return image


def mark_tokens(axes: Axes, rows: Range, keys: Range, parts: int = 4) -> None:
    """Ticks at whole tokens, in units of 1024 where they are whole too."""
    for axis, (start, stop) in ((axes.xaxis, keys), (axes.yaxis, rows)):
        size = stop - start
        count = min(parts, size)
        ticks = [start + size * i // count for i in range(count + 1)]
        whole = all(tick % 1024 == 0 for tick in ticks)
        axis.set_ticks(ticks, [format_tokens(tick) if whole else f"{tick:,}" for tick in ticks])
    axes.tick_params(labelsize=7)


def format_tokens(n: int) -> str:
    """131072  -->  128K;  2097152  -->  2M;  100  -->  100."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if n and n % size == 0:
            return f"{n // size}{unit}"
    return f"{n:,}"


def mark_plainly(*axes: Axis) -> None:
    """Ticks at 1, 2 and 5 of every decade of logarithmic axes, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
        axis.set_minor_formatter(NullFormatter())


def add_legend(figure: Figure, names: dict[str, str]) -> None:
    """A legend below the panels."""
    entries = patches(names)
    figure.legend(handles=entries, loc="outside lower center", ncols=min(3, len(entries)),
                  fontsize=8, frameon=False)


def patches(names: dict[str, str]) -> list[Any]:
    """The entries of a legend; a union of very many operands shows the first of them."""
    from matplotlib.patches import Patch

    return [Patch(facecolor=colour, label=shorten(name, 60, 1))
            for name, colour in list(names.items())[:2 * len(PALETTE)]]


def finish(figure: Figure, path: str | Path | None) -> Figure:
    """The figure, written to `path` where one is given."""
    if path is not None:
        figure.savefig(path)
    return figure


def save_picture(mask: Mask, path: str | Path, length: int = 128, block: int = 0) -> Path:
    """Draw the mask of a square call of `length` tokens into a PNG, SVG or PDF file.

    block  draw tile borders every `block` tokens; 0 for none
    Needs matplotlib: `pip install maskdsl[plot]`.
    """
    shape = Shape(length, length)
    figure = new_figure(5.2, 5.6)
    axes = figure.subplots()
    whole = check_range("length", None, length)
    draw_axes(axes, mask, view_call(mask, shape), "token", whole, whole, (128, 128), 512, {})
    axes.set_title(shorten(repr(mask), 64, 4), fontsize=9, loc="left", pad=18)
    if block:
        ticks = range(0, length + 1, block)
        axes.set_xticks(ticks)
        axes.set_yticks(ticks)
        axes.grid(color="0.75", linewidth=0.5)
    axes.set(xlabel="key", ylabel="query")
    finish(figure, path)
    return Path(path)
