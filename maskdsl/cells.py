"""A mask at a picture's resolution: cells, what is live in each, and which operand keeps it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from maskdsl.binding import bind_slots
from maskdsl.errors import PictureError
from maskdsl.expr import And, Mask, Or, join
from maskdsl.grains import grains_of, split_range
from maskdsl.heads import count_heads, pick_head
from maskdsl.raster import Bools, Box, Ints, View, is_opaque, judge
from maskdsl.shape import Shape, Site
from maskdsl.shares import Shares, count_shares

# Okabe and Ito's colours, which colour-blind readers can tell apart
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#b8a800", "#666666")
SHORTEST, LONGEST = 32, 1 << 20  # tokens, of a picture whose length was not given
SAMPLES = 8  # pairs asked along each side of a cell that no bound decides
SPLIT = 8  # boxes along each side of a cell in which no asked pair was live
PAIRS_AT_ONCE = 1 << 21
Range = tuple[int, int]  # (first, last + 1)


@dataclass(frozen=True, slots=True)
class Grid:
    """Borders of the cells: query rows int64[H + 1] and keys int64[W + 1], in tokens."""

    rows: Ints
    keys: Ints

    @classmethod
    def over(cls, rows: tuple[int, int], keys: tuple[int, int], height: int, width: int,
             step: tuple[int, int] = (1, 1)) -> Grid:
        """At most height x width nearly equal cells, their borders on multiples of `step` where
        the whole is longer than a step."""
        return cls(_borders(*rows, height, step[0]), _borders(*keys, width, step[1]))

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in cells."""
        return len(self.rows) - 1, len(self.keys) - 1

    @property
    def whole(self) -> tuple[Range, Range]:
        """(first, last + 1) query row, and key."""
        return ((int(self.rows[0]), int(self.rows[-1])), (int(self.keys[0]), int(self.keys[-1])))

    def box(self, q_offset: int) -> Box:
        """Its cells as boxes of absolute positions."""
        return Box(self.rows[:-1, None] + q_offset, self.rows[1:, None] - 1 + q_offset,
                   self.keys[None, :-1], self.keys[None, 1:] - 1)


def _borders(start: int, stop: int, cells: int, step: int) -> Ints:
    """start ... stop in at most `cells` parts."""
    steps = -(-(stop - start) // step)
    parts = min(cells, steps)
    inner = start + step * (np.arange(parts, dtype=np.int64) * steps // max(parts, 1))
    return np.append(inner, stop) if stop > start else np.array([start], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Cells:
    """What a mask keeps of each cell, [H, W].

    live   some pair of the cell is live (of a function that cannot be traced: of the asked pairs);
           never False where a traced mask keeps a pair
    full   every pair is live
    share  live pairs over all pairs: counted where intervals decide (`shares.count_shares`), exact
           in cells of at most 8 x 8 and where full or dead, else from 64 pairs spread over the cell
    unsure no pair that was asked is live, and the mask's formulas jump too often in the cell for
           bounds to say that none is; a part of `live`
    """

    live: Bools
    full: Bools
    share: Shares
    unsure: Bools


def default_length(mask: Mask) -> int:
    """A length, in tokens, at which the mask's sizes can be seen: four times the largest of them,
    rounded up to a power of two, between 32 and 1M, and no longer than the mask is defined for."""
    sizes = [size for node in mask.walk() if not node.below()
             for f in fields(node) for size in _numbers(getattr(node, f.name))]  # type: ignore[arg-type]
    length = 1 << (4 * max(sizes, default=8) - 1).bit_length()
    limits = [limit for node in mask.walk() if (limit := node.limit()) is not None]
    return int(min(max(SHORTEST, min(length, LONGEST)), *limits, LONGEST))


def _numbers(value: object) -> list[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        return [abs(value)]
    return [x for item in value for x in _numbers(item)] if isinstance(value, tuple) else []


def call_shape(mask: Mask, q_len: int | None, kv_len: int | None, q_offset: int | None = None,
               total_len: int | None = None) -> Shape:
    """The call a picture shows: lengths that are not given are the default, or square."""
    rows = default_length(mask) if q_len is None else q_len
    return Shape(rows, rows if kv_len is None else kv_len, q_offset,  # type: ignore[arg-type]
                 total_len)  # type: ignore[arg-type]


def check_range(name: str, given: Range | None, size: int) -> Range:
    """The part to draw, or a PictureError where nothing is in it."""
    start, stop = given or (0, size)
    if not 0 <= start < stop <= size:
        raise PictureError(f"{name}=({start}, {stop}) of {size}", "an empty or impossible part",
                           f"{name}=(0, {size})" if size else "a call with queries and keys")
    return start, stop


def view_call(mask: Mask, shape: Shape, batch: int = 0, head: int = 0, heads: int | None = None,
              slots: Mapping[str, object] | None = None) -> View:
    """The view of one head; the number of heads comes from PerHead where the caller has none.
    PictureError for a head that is not among them."""
    count = heads or count_heads(mask) or head + 1
    if head not in range(count):
        raise PictureError(f"head={head!r} of {count}", "there is no such head",
                           f"head=0 to head={count - 1}")
    data = {name: to_cpu(value) for name, value in (slots or {}).items()}
    return View(shape, batch, head, count, bind_slots(mask, data, shape))


def to_cpu(value: Any) -> Any:
    """A slot's data with its tensors on the CPU, where pictures are made."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    moved = copy.copy(value)
    for name, held in getattr(value, "__dict__", {}).items():
        if isinstance(held, torch.Tensor):
            object.__setattr__(moved, name, held.cpu())
    return moved


def measure_cells(mask: Mask, grid: Grid, view: View) -> Cells:
    """Bounds decide most cells. The others are counted where intervals decide, else asked at 64
    pairs, and split where all were dead."""
    mask = pick_head(mask, view.head)
    box = grid.box(view.shape.q_offset)
    live, full = (part.copy() for part in judge(mask, box, view))
    share, unsure = full.astype(np.float64), np.zeros(full.shape, dtype=bool)
    open_ = live & ~full
    if not open_.any():
        return Cells(live, full, share, unsure)
    chosen = box.take(open_)
    asked, exact = count_or_ask(mask, grid, view, open_)
    share[open_] = asked
    doubtful = ~exact & (asked == 0)
    still = np.where(exact, asked > 0, True)
    if is_opaque(mask):
        still[doubtful] = False
    elif doubtful.any():
        may, known = split_boxes(mask, chosen.take(doubtful), view)
        still[doubtful], open_unsure = may, np.zeros_like(doubtful)
        open_unsure[doubtful] = may & ~known
        unsure[open_] = open_unsure
    live[open_] = still
    full[open_] = exact & (asked == 1)
    return Cells(live, full, share, unsure)


def count_or_ask(mask: Mask, grid: Grid, view: View, open_: Bools) -> tuple[Shares, Bools]:
    """(live share, whether it is exact) of the cells `open_`, flat."""
    counted = None if is_opaque(mask) else \
        count_shares(mask, grid.rows, grid.keys, view.shape, view.head)
    if counted is None:
        return ask_pairs(mask, grid.box(view.shape.q_offset).take(open_), view)
    shares, exact = counted
    return shares[open_], np.broadcast_to(exact[:, None], open_.shape)[open_]


def ask_pairs(mask: Mask, box: Box, view: View) -> tuple[Shares, Bools]:
    """(live share, whether it is exact) of flat boxes, from at most 8 x 8 pairs of each."""
    (n,) = box.shape
    step = max(1, PAIRS_AT_ONCE // SAMPLES**2)
    parts = [_ask(mask, box.take(_slice(n, i, step)), view) for i in range(0, n, step)]
    return np.concatenate([a for a, _ in parts]), np.concatenate([b for _, b in parts])


def _slice(n: int, start: int, step: int) -> Bools:
    chosen = np.zeros(n, bool)
    chosen[start:start + step] = True
    return chosen


def _ask(mask: Mask, box: Box, view: View) -> tuple[Shares, Bools]:
    p, p_used, p_all = _places(box.p_lo, box.p_hi, 1)
    k, k_used, k_all = _places(box.k_lo, box.k_hi, 2)
    # Every row of a box asks keys of its own, or periodic masks would be met in step.
    site = Site.of(view.shape, view.batch, view.head, view.heads, view.bound)
    p, k = np.broadcast_arrays(p[:, :, None], k[:, None, :] if k_all.all() else
                               _shifted(box, k, k_all))
    used = p_used[:, :, None] & k_used[:, None, :]
    live = mask.contains(torch.from_numpy(np.ascontiguousarray(p)),
                         torch.from_numpy(np.ascontiguousarray(k)), site)
    live = np.broadcast_to(np.asarray(live, dtype=bool), used.shape) & used
    return live.sum((1, 2)) / used.sum((1, 2)), p_all & k_all


def _places(low: Ints, high: Ints, seed: int) -> tuple[Ints, Bools, Bools]:
    """(places int64[n, 8], which of them count, whether they are all of the range)."""
    size = high - low + 1
    every = size <= SAMPLES
    step = np.arange(SAMPLES, dtype=np.int64)
    jitter = np.random.default_rng(seed).random((len(low), SAMPLES))
    spread = ((step + jitter) * (size[:, None] / SAMPLES)).astype(np.int64)
    places = low[:, None] + np.minimum(np.where(every[:, None], step, spread), size[:, None] - 1)
    return places, ~every[:, None] | (step < size[:, None]), every


def _shifted(box: Box, k: Ints, every: Bools) -> Ints:
    """Keys int64[n, 8, 8] that differ from row to row, within the strata of `_places`."""
    size = (box.k_hi - box.k_lo + 1)[:, None, None]
    jitter = np.random.default_rng(3).random((len(k), SAMPLES, SAMPLES))
    spread = ((np.arange(SAMPLES) + jitter) * (size / SAMPLES)).astype(np.int64)
    moved = box.k_lo[:, None, None] + np.minimum(spread, size - 1)
    return np.where(every[:, None, None], k[:, None, :], moved)


def split_boxes(mask: Mask, box: Box, view: View, evenly: bool = True) -> tuple[Bools, Bools]:
    """(whether any part of each flat box may hold a live pair, whether no formula jumps inside the
    parts): parts where the mask's formulas jump, then (`evenly`) 8 x 8 equal ones."""
    live = np.ones(len(box.p_lo), bool)
    rows, keys = grains_of(mask)
    p_lo, p_hi, p_fits = split_range(box.p_lo, box.p_hi, rows, SPLIT)
    k_lo, k_hi, k_fits = split_range(box.k_lo, box.k_hi, keys, SPLIT)
    known = p_fits & k_fits
    if rows or keys:
        live[known] = judge_parts(mask, [x[known] for x in (p_lo, p_hi, k_lo, k_hi)], view)
    if evenly:
        part = box.take(live)
        live[live] = judge_parts(
            mask, [*_parts(part.p_lo, part.p_hi), *_parts(part.k_lo, part.k_hi)], view)
    return live, known


def judge_parts(mask: Mask, parts: list[Ints], view: View) -> Bools:
    """Whether a part of each box may hold a live pair; the parts are all rows times all keys of
    (p_lo, p_hi, k_lo, k_hi), int64[boxes, parts] each."""
    n, pieces = len(parts[0]), parts[0].shape[1] * parts[2].shape[1]
    live = np.zeros(n, bool)
    step = max(1, PAIRS_AT_ONCE // pieces)
    for i in range(0, n, step):
        p_lo, p_hi, k_lo, k_hi = (part[i:i + step] for part in parts)
        may, _ = judge(mask, Box(p_lo[:, :, None], p_hi[:, :, None], k_lo[:, None], k_hi[:, None]),
                       view)
        live[i:i + step] = may.any((1, 2))
    return live


def _parts(low: Ints, high: Ints) -> tuple[Ints, Ints]:
    """Each range in 8 parts (of a shorter one some are the same token), int64[n, 8] each."""
    size = (high - low + 1)[:, None]
    step = np.arange(SPLIT, dtype=np.int64)
    first = low[:, None] + step * size // SPLIT
    last = low[:, None] + np.maximum((step + 1) * size // SPLIT - 1, step * size // SPLIT)
    return first, last


def parts_of(mask: Mask) -> list[tuple[str, Mask]]:
    """(name, mask) of the operands whose union the mask is, for colouring.

    Causal() & (Sink(4) | Window(8))  -->  Sink(4): Causal() & Sink(4), Window(8): Causal() & ...
    """
    if isinstance(mask, Or):
        return [part for arg in mask.args for part in parts_of(arg)]
    if isinstance(mask, And):
        unions = [arg for arg in mask.args if isinstance(arg, Or)]
        if len(unions) == 1:
            rest = tuple(arg for arg in mask.args if arg is not unions[0])
            return [(name, join(And, (part, *rest))) for name, part in parts_of(unions[0])]
    return [(repr(mask), mask)]


@dataclass(frozen=True, slots=True)
class Sources:
    """Which operand keeps a cell.

    names  one for each operand
    owner  int[H, W]: the operand that keeps most of the cell, the first of equals; -1 if dead
    cells  of the whole mask
    """

    names: tuple[str, ...]
    owner: npt.NDArray[np.int64]
    cells: Cells


def find_sources(mask: Mask, grid: Grid, view: View) -> Sources:
    """The operands of the mask's union, and which of them keeps each cell."""
    mask = pick_head(mask, view.head)
    whole = measure_cells(mask, grid, view)
    parts = parts_of(mask)
    if len(parts) == 1:
        return Sources((parts[0][0],), np.where(whole.live, 0, -1), whole)
    each = [measure_cells(part, grid, view) for _, part in parts]
    whole = settle(whole, each)
    weight = np.stack([np.where(cells.live, cells.share + 1e-9, -1.0) for cells in each])
    owner = np.where(whole.live, weight.argmax(0), -1)
    return Sources(tuple(name for name, _ in parts), owner, whole)


def settle(whole: Cells, each: list[Cells]) -> Cells:
    """The cells of a union: what one operand leaves open another may settle."""
    settled = reduce(np.logical_or, (cells.live & ~cells.unsure for cells in each))
    return replace(whole, unsure=whole.unsure & ~settled)


def mean_share(cells: Cells, grid: Grid) -> float:
    """Live pairs over all pairs of the grid."""
    areas = np.diff(grid.rows)[:, None] * np.diff(grid.keys)[None, :]
    return float((cells.share * areas).sum() / max(1, areas.sum()))
