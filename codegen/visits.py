"""What the loops of one head visit, counted on the host: a numpy twin of the listing on the GPU.

The text that cuts the lists to a query tile (`slash_segments`, `column_segments`, `table_lines`) is
not written again: it is the kernel's own text, run here on arrays with one entry a query tile.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from maskdsl.codegen.call_data import Bools, HeadData, Table
from maskdsl.codegen.emit_lists import column_segments, cores_text, slash_segments, table_lines
from maskdsl.codegen.plan import Plan
from maskdsl.shape import Shape
from maskdsl.tiles import Ints

CHUNK = 1 << 22  # (query tile, key tile) pairs looked at together


@dataclass(frozen=True, slots=True)
class Visited:
    """Steps of the loops, summed over query tiles (and, added up, over heads).

    items        query tiles: programs of the kernel
    full         tiles of the static FULL loop; masked: of the static MASKED loop
    listed_full  tiles listed by tables, live throughout; listed_part: live in part
    slash        tiles at listed distances, all with a mask
    columns      steps of gathered columns, as many columns each as a tile has keys
    longest      steps of the longest item
    first        keys of the first tiles of all items: the Hopper kernel's, whose first tiles are
                 narrower than the others and no steps
    """

    items: int = 0
    full: int = 0
    masked: int = 0
    listed_full: int = 0
    listed_part: int = 0
    slash: int = 0
    columns: int = 0
    longest: int = 0
    first: int = 0

    @property
    def listed(self) -> int:
        """Steps that call-time data adds."""
        return self.listed_full + self.listed_part + self.slash + self.columns

    @property
    def steps(self) -> int:
        """All steps of all loops."""
        return self.full + self.masked + self.listed

    def plus(self, other: Visited, times: int = 1) -> Visited:
        """These and `times` times the others."""
        sums = {f.name: getattr(self, f.name) + times * getattr(other, f.name)
                for f in fields(self)}
        return Visited(**sums | {"longest": max(self.longest, other.longest)})


def count_visits(plan: Plan, shape: Shape, data: HeadData | None = None, batch: int = 0,
                 head: int = 0) -> Visited:
    """The steps of one head; without data the lists count as empty and documents as one."""
    return sum_steps(count_steps(plan, shape, data, batch, head))


def count_steps(plan: Plan, shape: Shape, data: HeadData | None = None, batch: int = 0,
                head: int = 0) -> dict[str, Ints]:
    """The steps of every query tile of one head, int64[query tiles], by the fields of `Visited`."""
    bound = None if data is None else data.bound
    values = plan.run_bounds(shape, batch, head, bound)
    counts = dict(zip(("full", "masked"), static_steps(plan, shape, values), strict=True))
    if data is not None and plan.lists.listed and len(values["p_first"]):
        if plan.lists.tables:
            counts["listed_full"], counts["listed_part"] = listed_steps(plan, values, data)
        if plan.lists.slashes:
            counts["slash"] = slash_steps(plan, values, data)
        if plan.lists.columns:
            counts["columns"] = column_steps(plan, values, data)
    return counts


def sum_steps(counts: dict[str, Ints]) -> Visited:
    """The steps of all query tiles together."""
    tiles = len(counts["full"])
    if not tiles:
        return Visited()
    total = sum(counts.values(), np.zeros(tiles, dtype=np.int64))
    return Visited(items=tiles, longest=int(total.max()),
                   **{name: int(count.sum()) for name, count in counts.items()})


def static_steps(plan: Plan, shape: Shape, values: dict[str, Any]) -> tuple[Ints, Ints]:
    """(full, masked) tiles of every query tile."""
    zero = np.zeros(len(values["p_first"]), dtype=np.int64)
    full, masked = (sum((b - a for a, b in plan.segments(which, values)), zero)
                    for which in (plan.full, plan.masked))
    if plan.sieve is None or not shape.kv_len:
        return full, masked
    keys = np.arange(-(-shape.kv_len // plan.block_n))
    masked = masked.copy()
    rows = max(1, CHUNK // len(keys))
    for i in range(0, len(zero), rows):
        part = cut(values, i, i + rows, len(zero))
        live = plan.sift(part, keys)  # of one row where it does not depend on the rows
        walked = np.zeros((len(part["p_first"]), len(keys)), dtype=bool)
        for a, b in plan.segments(plan.masked, part):
            walked |= (keys >= a[:, None]) & (keys < b[:, None])
        masked[i:i + rows] = (walked & live).sum(1)
    return full, masked


def cut(values: dict[str, Any], first: int, stop: int, size: int) -> dict[str, Any]:
    """The values of some query tiles; arrays of another length than `size` are tables, kept."""
    return {name: value[first:stop] if np.ndim(value) == 1 and len(value) == size
            and not name.startswith("slot_") else value for name, value in values.items()}


def count_below(marks: Ints, before: Any, place: Ints, size: Any) -> Ints:
    """How many marks lie below `place`; the kernels' `count_below` on a rising list."""
    found: Ints = np.searchsorted(marks, place)
    return found


def segment_steps(lines: list[str], segments: Any, values: dict[str, Any]) -> Ints:
    """Entries of all segments of a list, for every query tile."""
    table = values | {"count_below": count_below}
    exec("\n".join(lines), table)
    total = np.zeros(len(values["p_first"]), dtype=np.int64)
    for segment in segments:
        total = total + eval(segment.stop, table) - eval(segment.start, table)
    return total


def slash_steps(plan: Plan, values: dict[str, Any], data: HeadData) -> Ints:
    """Tiles at listed distances of every query tile."""
    found = [data.slashes(atom) for atom in plan.lists.slashes]
    marks = cover_slashes(np.unique(np.concatenate(found)), data.reach, plan.block_m, plan.block_n)
    names = {"union_slash_marks": marks + plan.block_m - 1, "union_slash_before": None,
             "union_slash_words": None}
    return segment_steps(*slash_segments(plan), values | names)


def cover_slashes(slashes: Ints, reach: int, block_m: int, block_n: int) -> Ints:
    """Distances of the tiles that cover all slashes, rising; as `slot_kernels.cover_slashes`."""
    known, far, found = slashes.tolist(), reach - 1, []
    while far > -block_m:
        place = bisect_right(known, far + block_m - 1)
        if not place:
            break
        found.append(min(far, known[place - 1]))
        far = found[-1] - block_n
    return np.array(found[::-1], dtype=np.int64)


def column_steps(plan: Plan, values: dict[str, Any], data: HeadData) -> Ints:
    """Steps of gathered columns of every query tile."""
    marks = np.unique(np.concatenate([data.columns(atom) for atom in plan.lists.columns]))
    names = {"union_column_marks": marks, "union_column_before": None,
             "union_column_words": None}
    return -(-segment_steps(*column_segments(plan), values | names) // plan.block_n)


# --- tables of blocks -----------------------------------------------------------------------------


class TileTable:
    """Some rows of a table of blocks, by key tiles of the kernel.

    some, every  bool[rows, key tiles]: whether any, and all, of a tile's blocks are live
    """

    def __init__(self, table: Table, first: int, stop: int, block_n: int, tiles: int) -> None:
        self.first = first
        self.some: Bools
        self.every: Bools
        live, keys = table.rows(first, stop), table.blocks[1]
        if keys >= block_n:
            at = np.minimum(np.arange(tiles) * block_n // keys, max(0, table.columns - 1))
            self.some = self.every = live[:, at]
        else:
            each = block_n // keys
            wide = np.zeros((len(live), tiles * each), dtype=bool)
            known = min(table.columns, wide.shape[1])
            wide[:, :known] = live[:, :known]
            parts = wide.reshape(len(live), tiles, each)
            self.some, self.every = np.any(parts, axis=2), np.all(parts, axis=2)


def look_up_tiles(table: TileTable, first_row: Ints, last_row: Ints, tile: Ints, words: Any,
                  kv_block: int, block_n: int) -> tuple[Bools, Bools]:
    """(some, every) of the rows of blocks [first_row, last_row], bool[query tiles, key tiles]."""
    first, last = first_row[:, 0] - table.first, last_row[:, 0] - table.first
    some: Bools = table.some[first]
    every: Bools = table.every[first]
    for i in range(1, int((last - first).max()) + 1):
        row = np.minimum(first + i, last)
        some = np.logical_or(some, table.some[row])
        every = np.logical_and(every, table.every[row])
    return some, every


def listed_steps(plan: Plan, values: dict[str, Any], data: HeadData) -> tuple[Ints, Ints]:
    """(full, partly live) tiles the tables list for every query tile."""
    shape, tiles = data.shape, len(values["p_first"])
    keys = -(-shape.kv_len // plan.block_n)
    full, part = np.zeros((2, tiles), dtype=np.int64)
    narrow = min(data.table(atom).blocks[1] for atom in plan.lists.tables)
    few = min(data.table(atom).blocks[0] for atom in plan.lists.tables)
    size = keys * max(1, plan.block_n // narrow) * max(1, plan.block_m // few)
    step = max(1, CHUNK // max(1, size))
    for i in range(0, tiles if keys else 0, step):
        some, every = _look_up(plan, cut(values, i, i + step, tiles), data,
                               np.arange(i, min(i + step, tiles)), keys)
        full[i:i + step] = every.sum(1)
        part[i:i + step] = (some & ~every).sum(1)
    return full, part


def _look_up(plan: Plan, values: dict[str, Any], data: HeadData, q_tile: Ints,
             keys: int) -> tuple[Bools, Bools]:
    """(listed, FULL) for some query tiles, by the lister's own text."""
    shape = data.shape
    names = {name: value[:, None] if np.ndim(value) == 1 and len(value) == len(q_tile)
             and not name.startswith("slot_") else value for name, value in values.items()}
    last = np.minimum(q_tile * plan.block_m + plan.block_m, shape.q_len) - 1
    names |= {"q_tile": q_tile[:, None], "last_in_tile": last[:, None], "tile": np.arange(keys),
              "BLOCK_M": plan.block_m, "look_up_tiles": look_up_tiles}
    for atom in plan.lists.tables:
        table = data.table(atom)
        rows = table.blocks[0]
        names |= {f"slot_{atom.slot}_table": TileTable(
            table, int(q_tile[0]) * plan.block_m // rows, int(last[-1]) // rows + 1, plan.block_n,
            keys), f"slot_{atom.slot}_table_words": 0}
    lo, hi = plan.lists.reach
    exec(f"first = tl.maximum({lo}, 0) // BLOCK_N\nstop = tl.cdiv(tl.maximum({hi}, 0), BLOCK_N)",
         names)
    exec("\n".join(table_lines(plan)), names)
    text = f"some & every & (tile * BLOCK_N + BLOCK_N <= kv_len){cores_text(plan)}"
    return names["some"], eval(text, names) & names["some"]
