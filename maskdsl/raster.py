"""Facts about whole boxes of pairs, by interval arithmetic on a mask's comparisons.

A box is query positions [p_lo, p_hi] times keys [k_lo, k_hi], both ends included. For every box of
an array `judge` tells whether the mask *may* hold a pair of it and whether it *surely* holds all
of them, without looking at a pair. So a picture costs as much as it has cells, at any length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import sympy

from maskdsl.binding import Bound
from maskdsl.dynamic import Blocks, ListMask, TokenTopK
from maskdsl.errors import TraceError
from maskdsl.expr import And, Mask, Not, Or
from maskdsl.heads import pick_head
from maskdsl.shape import Shape
from maskdsl.tiles import names_of
from maskdsl.trace import All, Condition, Ge, Has, Lookup, trace

Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Bounds: TypeAlias = tuple[Any, Any]  # smallest and largest value, int or int64[...]


@dataclass(frozen=True, slots=True)
class Box:
    """Boxes of pairs: four int64 arrays that broadcast together, ends included, in tokens."""

    p_lo: Ints
    p_hi: Ints
    k_lo: Ints
    k_hi: Ints

    def take(self, chosen: Bools) -> Box:
        """The boxes where `chosen` is True, as flat arrays."""
        parts = np.broadcast_arrays(self.p_lo, self.p_hi, self.k_lo, self.k_hi)
        return Box(*(part[chosen] for part in parts))

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions of the array of boxes."""
        return np.broadcast_shapes(self.p_lo.shape, self.k_lo.shape)


@dataclass(frozen=True, slots=True)
class View:
    """Which call, batch entry and head a picture shows.

    heads  query heads of the call, which slots with fewer heads need
    bound  the call-time data of every slot, from `maskdsl.binding.bind_slots`
    """

    shape: Shape
    batch: int = 0
    head: int = 0
    heads: int = 1
    bound: Mapping[str, Bound] = field(default_factory=dict)

    def lead(self, slot: str) -> tuple[int, int]:
        """Where in a slot's data this batch entry and head are."""
        batches, kinds = self.bound[slot].data.lead
        return (self.batch if batches > 1 else 0,
                self.head // (self.heads // kinds) if kinds > 1 else 0)


def judge(mask: Mask, box: Box, view: View) -> tuple[Bools, Bools]:
    """(may, sure), bool over the boxes: `may` False means no pair is live, `sure` True that all
    are. Between the two, single pairs have to be asked. A function that cannot be traced may hold
    any pair."""
    may, sure = _judge(pick_head(mask, view.head), box, view,
                       names_of(view.shape, view.batch, view.head, mask, view.bound or None))
    return (np.broadcast_to(np.asarray(may, dtype=bool), box.shape),
            np.broadcast_to(np.asarray(sure, dtype=bool), box.shape))


def _judge(mask: Mask, box: Box, view: View, names: dict[str, Any]) -> tuple[Any, Any]:
    if isinstance(mask, (Or, And)):
        parts = [_judge(arg, box, view, names) for arg in mask.args]
        join = np.logical_or if isinstance(mask, Or) else np.logical_and
        return reduce(join, (m for m, _ in parts)), reduce(join, (s for _, s in parts))
    if isinstance(mask, Not):
        may, sure = _judge(mask.operand, box, view, names)
        return np.logical_not(sure), np.logical_not(may)
    if isinstance(mask, ListMask):
        return judge_list(mask, box, view)
    condition = trace_or_none(mask)
    if condition is None:
        return True, False
    return judge_condition(condition, box, view, names)


@lru_cache(maxsize=1024)
def trace_or_none(mask: Mask) -> Condition | None:
    """The mask's condition; None for a function that only runs on numbers."""
    try:
        return trace(mask)
    except TraceError:
        return None


def is_opaque(mask: Mask) -> bool:
    """Whether some function in the mask can only be asked pair by pair."""
    return any(not node.below() and not isinstance(node, ListMask) and trace_or_none(node) is None
               for node in mask.walk())


def judge_condition(condition: Condition, box: Box, view: View,
                    names: dict[str, Any]) -> tuple[Any, Any]:
    """(may, sure) of a traced condition."""
    if isinstance(condition, Ge):
        low, high = bound_integer(condition.value, box, names)
        return high >= 0, low >= 0
    if isinstance(condition, Has):
        may, sure = judge_list(condition.atom, box, view)
        return (may, sure) if condition.held else (~sure, ~may)
    parts = [judge_condition(arg, box, view, names) for arg in condition.args]
    whole = isinstance(condition, All)
    join = np.logical_and if whole else np.logical_or
    return (reduce(join, (m for m, _ in parts), whole), reduce(join, (s for _, s in parts), whole))


# --- integers -------------------------------------------------------------------------------------


def bound_integer(e: sympy.Expr, box: Box, names: dict[str, Any]) -> Bounds:
    """The smallest and largest value of an integer expression over each box (or a little beyond:
    operands are taken as independent)."""
    if e.is_Integer:
        return int(e), int(e)
    if e.is_Symbol:
        if e.name in ("p", "k"):
            return (box.p_lo, box.p_hi) if e.name == "p" else (box.k_lo, box.k_hi)
        return names[e.name], names[e.name]
    if e.func == Lookup:
        return _bound_lookup(e, box, names)
    if e.func == sympy.floor:
        over, under = sympy.fraction(sympy.together(e.args[0]))
        (low, high), (divisor, _) = (bound_integer(x, box, names) for x in (over, under))
        return low // divisor, high // divisor  # a divisor is a number > 0, or a length
    parts = [bound_integer(arg, box, names) for arg in e.args]
    if e.is_Add:
        return sum(low for low, _ in parts), sum(high for _, high in parts)
    if e.func in (sympy.Max, sympy.Min):
        pick = np.maximum if e.func == sympy.Max else np.minimum
        return reduce(pick, (low for low, _ in parts)), reduce(pick, (high for _, high in parts))
    if e.func == sympy.Mod:
        return _bound_modulo(*parts)
    if e.is_Pow:
        parts = [parts[0]] * int(e.exp)
    return reduce(_multiply, parts)


def _multiply(a: Bounds, b: Bounds) -> Bounds:
    corners = [x * y for x in a for y in b]
    return reduce(np.minimum, corners), reduce(np.maximum, corners)


def _bound_modulo(value: Bounds, divisor: Bounds) -> Bounds:
    low, high = value
    m = np.maximum(divisor[1], 1)
    together = low // m == high // m  # no multiple of m lies between
    return np.where(together, low % m, 0), np.where(together, high % m, m - 1)


def _bound_lookup(e: sympy.Expr, box: Box, names: dict[str, Any]) -> Bounds:
    name, place = str(e.args[0]), e.args[1]
    table, last = names[name], names[name.rsplit("_", 1)[0] + "_tokens"]
    low, high = (table[np.clip(x, -1, last) + 1] for x in bound_integer(place, box, names))
    return low, high  # the table never falls


# --- lists from the call --------------------------------------------------------------------------


def judge_list(atom: ListMask, box: Box, view: View) -> tuple[Bools, Bools]:
    """(may, sure) of call-time lists, by counting entries in each box."""
    bound, lead = view.bound[atom.slot], view.lead(atom.slot)
    may, sure = np.zeros(box.shape, bool), np.zeros(box.shape, bool)
    if bound.vertical is not None:
        some, all_ = _judge_line(bound.vertical[lead], box.k_lo, box.k_hi)
        may, sure = may | some, sure | all_
    if bound.slash is not None:
        some, all_ = _judge_line(bound.slash[lead], box.p_lo - box.k_hi, box.p_hi - box.k_lo)
        may, sure = may | some, sure | all_
    if bound.table is not None:
        q_block, kv_block = atom.blocks if isinstance(atom, (Blocks, TokenTopK)) else (64, 1)
        some, all_ = _judge_table(bound.table[lead].cpu().numpy(), box, view.shape.q_offset,
                                  q_block, kv_block)
        may, sure = may | some, sure | all_
    return may, sure


def _judge_line(listed: Any, low: Ints, high: Ints) -> tuple[Bools, Bools]:
    """Whether some and whether all places of [low, high] are listed; none is beyond the table."""
    total = np.concatenate([[0], np.cumsum(listed.cpu().numpy(), dtype=np.int64)])
    size = len(total) - 1
    count = total[np.clip(high + 1, 0, size)] - total[np.clip(low, 0, size)]
    return count > 0, count == high - low + 1


def _judge_table(table: Bools, box: Box, q_offset: int, q_block: int,
                 kv_block: int) -> tuple[Bools, Bools]:
    """The same of blocks: sums along the keys once, then along the rows of each box."""
    total = np.zeros((table.shape[0] + 1, table.shape[1] + 1), dtype=np.int32)
    np.cumsum(table, axis=1, out=total[1:, 1:])
    np.cumsum(total, axis=0, out=total)
    top, bottom = (np.clip((p - q_offset) // q_block, 0, table.shape[0] - 1)
                   for p in (box.p_lo, box.p_hi))
    left, right = (np.clip(k // kv_block, 0, table.shape[1] - 1) for k in (box.k_lo, box.k_hi))
    count = (total[bottom + 1, right + 1] - total[top, right + 1]
             - total[bottom + 1, left] + total[top, left])
    return count > 0, count == (bottom - top + 1) * (right - left + 1)
