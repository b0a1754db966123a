"""Which tiles of a call may hold a live pair, and which hold nothing else.

The static part of a mask is read off its plan; what call-time data lists is counted with prefix
sums over the data's own tables. So the cost grows with rows, tiles and data, never with pairs.
Both answers are safe: no live tile is missing from `some`, no dead pair lies in `every`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from maskdsl.binding import SUPERSET, Bound
from maskdsl.codegen.plan import cover_tiles
from maskdsl.codegen.planner import make_plan
from maskdsl.dynamic import ListMask, VerticalSlash
from maskdsl.expr import And, Mask, Not, Or, join
from maskdsl.shape import Shape
from maskdsl.simplify import simplify
from maskdsl.trace import is_traceable

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Classes:
    """bool[query tiles, key tiles] each."""

    some: Bools
    every: Bools

    def flipped(self) -> Classes:
        """Of the complement."""
        return Classes(~self.every, ~self.some)


@dataclass(frozen=True, slots=True)
class Grid:
    """One batch entry and head of a call, cut into tiles of `block` = (query rows, keys)."""

    shape: Shape
    block: tuple[int, int]
    batch: int = 0
    head: int = 0
    heads: int = 1
    bound: Mapping[str, Bound] = field(default_factory=dict)

    @property
    def edges(self) -> tuple[Ints, Ints, Ints, Ints]:
        """First and last row of every query tile, first and last key of every key tile."""
        rows = np.arange(0, self.shape.q_len, self.block[0], dtype=np.int64)
        keys = np.arange(0, self.shape.kv_len, self.block[1], dtype=np.int64)
        return (rows, np.minimum(rows + self.block[0], self.shape.q_len) - 1,
                keys, np.minimum(keys + self.block[1], self.shape.kv_len) - 1)


def classify_tiles(mask: Mask, grid: Grid) -> Classes:
    """The classes of all tiles of one head (a mask without PerHead)."""
    if not has_lists(mask) and is_traceable(mask):
        return classify_static(mask, grid)
    if isinstance(mask, ListMask):
        return classify_listed(mask, grid)
    if isinstance(mask, Not):
        return classify_tiles(mask.operand, grid).flipped()
    if isinstance(mask, (Or, And)):
        return combine(mask, grid)
    rows, _, keys, _ = grid.edges  # a function that cannot be traced: anything may be
    size = len(rows), len(keys)
    return Classes(np.ones(size, dtype=bool), np.zeros(size, dtype=bool))


def has_lists(mask: Mask) -> bool:
    """Whether some of the mask's pairs are listed at the call."""
    return any(isinstance(node, ListMask) for node in mask.walk())


def combine(mask: Or | And, grid: Grid) -> Classes:
    """A union or an intersection; its static operands together, where bounds are exact."""
    kind: type[Or] | type[And] = type(mask)
    plain = [arg for arg in mask.args if not has_lists(arg) and is_traceable(arg)]
    parts = [classify_tiles(arg, grid) for arg in mask.args if arg not in plain]
    if plain:
        both = join(Or, tuple(plain)) if kind is Or else join(And, tuple(plain))
        parts.append(classify_static(both, grid))
    fold = np.logical_or if kind is Or else np.logical_and
    return Classes(fold.reduce([p.some for p in parts]), fold.reduce([p.every for p in parts]))


def classify_static(mask: Mask, grid: Grid) -> Classes:
    """From the plan: FULL tiles, and the MASKED ones it visits besides."""
    plan = make_plan(simplify(mask), *grid.block)
    values = plan.run_bounds(grid.shape, grid.batch, grid.head, grid.bound)
    rows, _, keys, _ = grid.edges
    tiles = np.arange(len(keys))
    full, masked = (cover_tiles(plan.segments(which, values), tiles, len(rows)) > 0
                    for which in (plan.full, plan.masked))
    if plan.sieve is not None and tiles.size and len(rows):
        masked &= plan.sift(values, tiles)
    return Classes(full | masked, full)


def classify_listed(atom: ListMask, grid: Grid) -> Classes:
    """From a slot's data, by counting what it lists inside each tile."""
    bound = grid.bound[atom.slot]
    first_row, last_row, first_key, last_key = grid.edges
    size = len(first_row), len(first_key)
    some, every = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    b, h = bound.lead_of(grid.batch, grid.head, grid.heads)
    if bound.vertical is not None and bound.vertical.shape[-1]:
        inside, whole = count_ranges(bound.vertical[b, h], first_key[None], last_key[None])
        some, every = some | inside, every | whole
    if bound.slash is not None and bound.slash.shape[-1]:
        offset = grid.shape.q_offset
        inside, whole = count_ranges(bound.slash[b, h],
                                     first_row[:, None] + offset - last_key[None],
                                     last_row[:, None] + offset - first_key[None])
        some, every = some | inside, every | whole
    if bound.table is not None and bound.table.numel():
        q_block, kv_block = (SUPERSET, 1) if isinstance(atom, VerticalSlash) else \
            atom.blocks  # type: ignore[attr-defined]
        inside, whole = count_blocks(bound.table[b, h], first_row // q_block, last_row // q_block,
                                     first_key // kv_block, last_key // kv_block)
        some, every = some | inside, every | whole
    return Classes(some, every)


def count_ranges(marks: torch.Tensor, first: Ints, last: Ints) -> tuple[Bools, Bools]:
    """Whether any, and whether all, of the numbers first..last are marked in bool[n]."""
    sums = np.concatenate([[0], np.cumsum(marks.cpu().numpy(), dtype=np.int64)])
    size = len(sums) - 1
    counts = sums[np.clip(last + 1, 0, size)] - sums[np.clip(first, 0, size)]
    return counts > 0, counts == last - first + 1


def count_blocks(table: torch.Tensor, top: Ints, bottom: Ints, left: Ints,
                 right: Ints) -> tuple[Bools, Bools]:
    """Whether any, and whether all, blocks of rows top..bottom and columns left..right are live."""
    sums = np.zeros((table.shape[0] + 1, table.shape[1] + 1), dtype=np.int64)
    sums[1:, 1:] = table.cpu().numpy().cumsum(0, dtype=np.int64).cumsum(1)
    wide = sums[:, right + 1] - sums[:, left]
    counts = wide[bottom + 1] - wide[top]
    return counts > 0, counts == (bottom - top + 1)[:, None] * (right - left + 1)[None]
