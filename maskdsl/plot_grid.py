"""Many masks in one picture: heads and layers as a grid, and how sparsity grows with length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maskdsl.atoms import Causal
from maskdsl.cells import (
    PALETTE,
    Grid,
    call_shape,
    mean_share,
    measure_cells,
    parts_of,
    view_call,
)
from maskdsl.dynamic import slots_of
from maskdsl.errors import PictureError
from maskdsl.expr import Mask
from maskdsl.heads import count_heads, pick_head
from maskdsl.plot import (
    add_legend,
    draw_axes,
    finish,
    format_tokens,
    mark_plainly,
    new_figure,
    patches,
    shorten,
)
from maskdsl.raster import is_opaque
from maskdsl.shape import Shape
from maskdsl.spans import spans
from maskdsl.tiles import can_count, count_pairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PANELS = 128
LENGTHS = tuple(1 << n for n in range(10, 21))  # 1K to 1M tokens
Masks = Mask | Mapping[str, Mask] | Iterable[Mask] | Any


def name_masks(masks: Masks) -> dict[str, Mask]:
    """Title -> mask of a mask, a dict, a list (named by their text) or a LayerPolicy (by layers,
    equal ones together, and with `Causal()`, as `compile_layers` takes them)."""
    if isinstance(masks, Mask):
        return {repr(masks): masks}
    if hasattr(masks, "kinds"):  # a LayerPolicy, which lives in a layer above this one
        return {f"layer{'s' if len(layers) > 1 else ''} {format_runs(layers)}": Causal() & mask
                for mask, layers in masks.kinds()}
    named = dict(masks) if isinstance(masks, Mapping) else {repr(m): m for m in masks}
    bad = [mask for mask in named.values() if not isinstance(mask, Mask)]
    if bad or not named:
        raise PictureError(f"a picture of {bad[0]!r}" if bad else "a picture of no mask",
                           "masks are needed", '{"window": Window(512), "dense": Causal()}')
    return named


def format_runs(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5  -->  0-2, 5."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def split_heads(mask: Mask) -> list[tuple[str, int, Mask]]:
    """(title, first head, mask) of every kind of head; one entry without a title where all are
    alike. Heads whose slots may differ stay apart."""
    count = count_heads(mask)
    if count is None:
        return [("", 0, mask)]
    kinds: dict[Any, list[int]] = {}
    for head in range(count):
        one = pick_head(mask, head)
        kinds.setdefault((one, head) if slots_of(one) else one, []).append(head)
    return [(f"head{'s' if len(heads) > 1 else ''} {format_runs(heads)}", heads[0],
             pick_head(mask, heads[0])) for heads in kinds.values()]


def plot_masks(masks: Masks, q_len: int | None = None, kv_len: int | None = None, *,
               by: str = "source", q_offset: int | None = None, total_len: int | None = None,
               batch: int = 0, slots: Mapping[str, object] | None = None,
               tile: tuple[int, int] = (128, 128), columns: int | None = None, cells: int = 192,
               path: str | Path | None = None) -> Figure:
    """Draw many masks as a grid of pictures; returns the matplotlib figure.

    masks    a dict from title to mask, a list of masks, a LayerPolicy, or one mask with PerHead.
             Where masks have PerHead, a row is a mask (a layer) and a column a kind of head; equal
             heads, and equal layers of a policy, are drawn once. The layers of a policy are drawn
             with `Causal()`, all others as they stand.
    columns  panels in a row, where no mask has PerHead; default: about as many as rows
    The other arguments are those of `plot_mask`; a length that is not given is the longest default.
    Errors: PictureError, ShapeError, MissingSlotError.
    """
    named = name_masks(masks)
    by_head = any(count_heads(mask) for mask in named.values())
    panels = [(title, mask, split_heads(mask)) for title, mask in named.items()]
    total = sum(len(heads) for _, _, heads in panels)
    if total > MOST_PANELS:
        raise PictureError(f"a grid of {total} pictures", f"more than {MOST_PANELS} are too small "
                           "to be seen", "some of the heads or layers")
    wide = max(len(heads) for _, _, heads in panels) if by_head else \
        columns or int(np.ceil(np.sqrt(total)))
    high = len(panels) if by_head else -(-total // wide)
    length = q_len or max(call_shape(m, None, None).q_len for m in named.values())
    figure = new_figure(max(4.2, 2.6 * wide), 0.9 + 2.75 * high)
    grid = figure.subplots(high, wide, squeeze=False)
    legend: dict[str, str] = {}
    operands = {name for _, _, heads in panels for *_, one in heads for name, _ in parts_of(one)}
    shared = by != "source" or len(operands) <= len(PALETTE)  # else a colour would mean two things
    for i, (title, mask, heads) in enumerate(panels):
        for j, (which, head, one) in enumerate(heads):
            axes = grid[i, j] if by_head else grid[i // wide, i % wide]
            shape = call_shape(mask, length, kv_len, q_offset, total_len)
            view = view_call(mask, shape, batch, head, None, slots)
            own_legend: dict[str, str] = {}
            draw_axes(axes, one, view, by, (0, shape.q_len), (0, shape.kv_len), tile, cells,
                      legend if shared else own_legend)
            if own_legend:
                axes.legend(handles=patches(own_legend), loc="upper right", fontsize=5,
                            frameon=False)
            own = title if len(panels) > 1 and j == 0 else ""
            axes.set_title("\n".join(shorten(text, 36, 2) for text in (own, which) if text),
                           fontsize=8, loc="left", pad=14)
    if len(panels) == 1:
        figure.suptitle(shorten(panels[0][0], 30 * wide, 3), fontsize=9)
    for axes in grid.flat:
        axes.set_visible(bool(axes.images))
    if shared:
        add_legend(figure, legend)
    return finish(figure, path)


def live_share(mask: Mask, length: int) -> tuple[float, bool]:
    """(live pairs of a square call over its causal pairs, whether exact)."""
    shape = Shape(length, length)
    causal = length * (length + 1) / 2
    if not is_opaque(mask) and (all(piece.is_exact for piece in spans(mask))
                                or can_count(mask, shape)):
        return count_pairs(mask, shape) / causal, True
    grid = Grid.over((0, length), (0, length), 128, 128)
    share = mean_share(measure_cells(mask, grid, view_call(mask, shape)), grid)
    return share * length * length / causal, False


def plot_sparsity(masks: Masks, lengths: Iterable[int] = LENGTHS, *,
                  path: str | Path | None = None) -> Figure:
    """How much of causal attention each mask keeps, and keys a row, over the length of the prompt.

    masks    as in `plot_masks`; of PerHead the mean over the heads
    lengths  tokens; default 1K to 1M

    Live pairs are counted exactly where intervals decide or rows repeat (full lines), and estimated
    from spread pairs where neither is so (broken lines). Lengths beyond what a mask is defined for
    are left out.
    """
    figure = new_figure(9.2, 4.2)
    lengths, some_estimated = list(lengths), False
    left, right = figure.subplots(1, 2)
    for i, (title, mask) in enumerate(name_masks(masks).items()):
        limit = min((x for node in mask.walk() if (x := node.limit()) is not None), default=None)
        used = [n for n in lengths if limit is None or n <= limit]
        heads = [pick_head(mask, head) for head in range(count_heads(mask) or 1)]
        shares = [[live_share(head, n) for head in heads] for n in used]
        mean = np.array([np.mean([share for share, _ in row]) for row in shares])
        exact = all(known for row in shares for _, known in row)
        some_estimated |= not exact
        style: Any = {"color": PALETTE[i % len(PALETTE)], "label": shorten(title, 60, 1),
                      "linestyle": "-" if exact else "--", "marker": "o", "markersize": 3}
        left.plot(used, 100 * mean, **style)
        right.plot(used, mean * (np.array(used) + 1) / 2, **style)
    for axes, told in ((left, "live pairs, % of causal"), (right, "live keys a row, mean")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted(lengths)[::2]
        axes.set_xticks(ticks, [format_tokens(n) for n in ticks])
        mark_plainly(axes.yaxis)
        axes.tick_params(labelsize=8)
        axes.set_xlabel("tokens")
        axes.set_title(told, fontsize=9, loc="left")
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False,
                  title="broken lines: estimated" if some_estimated else None, title_fontsize=8)
    return finish(figure, path)
