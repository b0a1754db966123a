"""What a call makes every kind of head do: steps of the loops, live pairs. Counted, not estimated.

Heads that share a mask and the same entry of every slot's data do the same work and are counted
once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from maskdsl.codegen.call_data import HeadData, row_of
from maskdsl.codegen.lists import base_of, group_heads
from maskdsl.codegen.live import count_live
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.planner import make_plan
from maskdsl.codegen.row_classes import RowClass, classify_rows
from maskdsl.codegen.visits import Visited, count_steps, sum_steps
from maskdsl.dynamic import slots_of
from maskdsl.expr import Mask
from maskdsl.shape import Shape, Site
from maskdsl.spans import Piece, spans
from maskdsl.tiles import can_count, count_pairs
from maskdsl.trace import BATCH, HEAD, Condition, Ge, Has, is_traceable

PAIR_LIMIT = 1 << 30  # pairs of one head tested one by one where no interval decides
LIST_LIMIT = 1 << 36  # the same, where lists decide: 64 pairs at a time, and most words not at all
OPAQUE_LIMIT = 1 << 26  # the same, where every pair is a call of the user's function


@dataclass(frozen=True, slots=True)
class CallHeads:
    """How many of everything a call has."""

    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 128
    value_dim: int = 128


@dataclass(frozen=True, slots=True)
class KindWork:
    """The heads that share one mask, summed over them and the batch.

    mask        their mask
    heads       how many query heads
    live_pairs  None where it could only be told by testing too many pairs
    visited     steps of the loops
    plan        how their kernel walks the mask
    rows        which rows see which keys; () where they were not asked for
    which       the query heads, by number; () for all of them
    entries     how many sets of heads and batch entries differ in their work; `rows` are of the
                first
    """

    mask: Mask
    heads: int
    live_pairs: int | None
    visited: Visited
    plan: Plan
    rows: tuple[RowClass, ...] = ()
    which: tuple[int, ...] = ()
    entries: int = 1


def count_work(mask: Mask, tile: tuple[int, int], shape: Shape, call: CallHeads,
               data: Mapping[str, Any] | None = None, with_pairs: bool = True,
               widen: Callable[[Mask], Mask] | None = None) -> tuple[KindWork, ...]:
    """The work of every kind of head of a simplified mask; `tile` in tokens.

    with_pairs  whether live pairs and classes of rows are wanted too
    data     the slots' data, checked; None: lists count as empty, all tokens as one document
    widen    gives the mask whose plan is walked, a superset, where a mask cannot be traced
    """
    found = []
    for heads, one in group_heads(mask):
        plan = make_plan(one if widen is None or is_traceable(one) else widen(one), *tile)
        entries = count_entries(one, heads or tuple(range(call.heads)), call, data)
        visited, live = Visited(), 0 if with_pairs else None
        rows: tuple[RowClass, ...] | None = None if with_pairs else ()
        for (batch, head), times in entries.items():
            bound = None if data is None else HeadData(data, shape, batch, head, call.heads)
            steps = count_steps(plan, shape, bound, batch, head)
            visited = visited.plus(sum_steps(steps), times)
            if rows is None:
                rows = classify_rows(plan, shape, steps, None if bound is None else bound.bound)
                rows = rows if is_traceable(one) else tuple(map(ask_pairs, rows))
            more = live_pairs(one, shape, bound, batch, head) if live is not None else None
            live = None if live is None or more is None else live + times * more
        found.append(KindWork(one, len(heads) or call.heads, live, visited, plan, rows or (), heads,
                              len(entries)))
    return tuple(found)


def ask_pairs(rows: RowClass) -> RowClass:
    """The class of a superset, where a function of the user's is asked for every pair."""
    return replace(rows, keys=tuple(f"{keys}, each asked" for keys in rows.keys))


def count_entries(mask: Mask, heads: tuple[int, ...], call: CallHeads,
                  data: Mapping[str, Any] | None) -> dict[tuple[int, int], int]:
    """(batch, head) of one of each set of heads with equal work, and how many it stands for."""
    told_apart = not is_traceable(mask) or any(map(names_head, spans(mask)))
    names = [atom.slot for atom in slots_of(mask)]
    found: dict[Any, list[Any]] = {}
    for batch in range(call.batch):
        for head in heads:
            rows = () if data is None else tuple(
                row_of(data[name], batch, head, call.heads) for name in names)
            key = (batch, head) if told_apart else rows
            found.setdefault(key, [(batch, head), 0])[1] += 1
    return dict(map(tuple, found.values()))


def names_head(piece: Piece) -> bool:
    """Whether the piece itself, not only call-time data, differs between batch entries or heads."""
    bounds = piece.lo + piece.hi + piece.first + piece.last
    return any(t.has(BATCH, HEAD) for t in bounds) or _condition_names_head(piece.rest)


def _condition_names_head(condition: Condition) -> bool:
    if isinstance(condition, Ge):
        return bool(condition.value.has(BATCH, HEAD))
    if isinstance(condition, Has):
        return False
    return any(map(_condition_names_head, condition.args))


def live_pairs(mask: Mask, shape: Shape, data: HeadData | None, batch: int,
               head: int) -> int | None:
    """Live pairs of one head; None where only testing too many pairs could tell."""
    few = shape.q_len * shape.kv_len <= PAIR_LIMIT
    if not is_traceable(mask):
        small = shape.q_len * shape.kv_len <= OPAQUE_LIMIT
        return count_opaque(mask, shape, batch, head) if small and not slots_of(mask) else None
    pieces = spans(mask)
    if data is None:
        base = base_of(mask)
        exact = all(piece.is_exact for piece in spans(base))
        return count_pairs(base, shape, head) if exact or few or can_count(base, shape) else None
    if all(piece.is_exact for piece in pieces):
        return count_pairs(mask, shape, head, batch, data.bound)
    if shape.q_len * shape.kv_len > LIST_LIMIT:
        return None
    return count_live(mask, data) if few or not any(_tests_keys(p.rest) for p in pieces) else None


def count_opaque(mask: Mask, shape: Shape, batch: int, head: int) -> int:
    """Live pairs of a mask with a function that cannot be traced: every pair asked."""
    if not shape.kv_len:
        return 0
    site, keys = Site.of(shape, batch, head), torch.arange(shape.kv_len)
    rows = max(1, (1 << 22) // shape.kv_len)
    total = 0
    for first in range(0, shape.q_len, rows):
        p = torch.arange(first, min(first + rows, shape.q_len)) + shape.q_offset
        live = torch.as_tensor(mask.contains(p[:, None], keys[None, :], site))
        total += int(live.broadcast_to(len(p), len(keys)).sum())
    return total


def _tests_keys(condition: Condition) -> bool:
    """Whether a condition asks each pair for more than whether a list holds it."""
    if isinstance(condition, Has):
        return False
    return isinstance(condition, Ge) or any(map(_tests_keys, condition.args))
