"""Exact facts about a mask at given lengths: intervals of rows, classes of tiles, live pairs.

All of it from the spans, so the cost grows with the rows, never with rows times keys.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import sympy

from maskdsl.dynamic import Document, Prefix, SlotMask, slots_of
from maskdsl.expr import Mask
from maskdsl.row_counts import count_by_classes, is_countable
from maskdsl.shape import Shape
from maskdsl.spans import Piece, spans
from maskdsl.text import evaluate, write_condition, write_integer

Ints: TypeAlias = npt.NDArray[np.int64]


class TileClass(enum.Enum):
    """How much of a tile is live."""

    DEAD = "dead"
    MIXED = "mixed"
    FULL = "full"


def _largest(terms: tuple[sympy.Expr, ...], values: dict[str, Any], default: Ints) -> Ints:
    result = default
    for term in terms:
        result = np.maximum(result, evaluate(write_integer(term), **values))
    return result


def _smallest(terms: tuple[sympy.Expr, ...], values: dict[str, Any], default: Ints) -> Ints:
    result = default
    for term in terms:
        result = np.minimum(result, evaluate(write_integer(term), **values))
    return result


def names_of(shape: Shape, batch: int = 0, head: int = 0, mask: Mask | None = None,
             bound: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The lengths of a call, and the data of the mask's slots, under the names the text uses.

    Without data (`bound` None) all tokens are one document, prefixes and lists are empty.
    """
    names: dict[str, Any] = {"q_len": shape.q_len, "kv_len": shape.kv_len,
                             "total_len": shape.total_len, "batch": batch, "head": head}
    for atom in slots_of(mask) if mask is not None else ():
        names |= _slot_names(atom, shape, batch, None if bound is None else bound[atom.slot].data)
    return names


def _slot_names(atom: SlotMask, shape: Shape, batch: int, data: Any) -> dict[str, Any]:
    name = f"slot_{atom.slot}"
    if isinstance(atom, Prefix):
        length = 0 if data is None else int(data.lengths[batch if data.lead[0] > 1 else 0])
        return {f"{name}_length": length}
    if not isinstance(atom, Document):
        return {f"in_{atom.slot}": np.False_}
    if data is None:
        start = np.zeros(shape.kv_len + 2, dtype=np.int64)
        stop = np.full(shape.kv_len + 2, shape.kv_len)
        start[-1], stop[0] = shape.kv_len, 0
        return {f"{name}_start": start, f"{name}_stop": stop, f"{name}_tokens": shape.kv_len}
    b = batch if data.lead[0] > 1 else 0
    return {f"{name}_start": data.start[b].cpu().numpy().astype(np.int64),
            f"{name}_stop": data.stop[b].cpu().numpy().astype(np.int64),
            f"{name}_tokens": data.length}


def row_intervals(piece: Piece, p: Ints, shape: Shape, head: int = 0,
                  names: dict[str, Any] | None = None) -> tuple[Ints, Ints]:
    """[lo, hi) of the piece for every absolute position in `p`, int64[len(p)]; void: hi = lo."""
    values = {**(names or names_of(shape, head=head)), "p": p}
    lo = _largest(piece.lo, values, np.zeros_like(p))
    hi = _smallest(piece.hi, values, np.full_like(p, shape.kv_len))
    first = _largest(piece.first, values, np.full_like(p, np.iinfo(np.int64).min))
    last = _smallest(piece.last, values, np.full_like(p, np.iinfo(np.int64).max))
    hi = np.where((p >= first) & (p < last), hi, lo)
    return lo, np.maximum(lo, hi)


def unite_intervals(bounds: list[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    """The disjoint union of the intervals [lo, hi) of every row, int64[intervals, rows] each."""
    # Sorting starts and ends apart keeps how many intervals cover each key, hence their union.
    lo = np.sort(np.stack([b[0] for b in bounds]), axis=0)
    hi = np.sort(np.stack([b[1] for b in bounds]), axis=0)
    lo[1:] = np.maximum(lo[1:], hi[:-1])
    return lo, np.maximum(lo, hi)


def guard_rows(piece: Piece, shape: Shape) -> tuple[int, int]:
    """The query rows [first, stop) of a call that have a piece without data in its row guards."""
    names = names_of(shape)
    ends = [max([shape.q_offset, *(int(evaluate(write_integer(t), **names)) for t in piece.first)]),
            min([shape.q_offset + shape.q_len,
                 *(int(evaluate(write_integer(t), **names)) for t in piece.last)])]
    return ends[0] - shape.q_offset, ends[1] - shape.q_offset


def live_rows(mask: Mask, p: Ints, k: Ints, shape: Shape, head: int = 0) -> npt.NDArray[np.bool_]:
    """bool[len(p), len(k)], rasterised from the spans (not from `contains`)."""
    live = np.zeros((len(p), len(k)), dtype=bool)
    if not live.size:
        return live
    names = names_of(shape, 0, head, mask)
    for piece in spans(mask):
        lo, hi = row_intervals(piece, p, shape, head, names)
        inside = (k >= lo[:, None]) & (k < hi[:, None])
        if not piece.is_exact:
            values = {**names, "p": p[:, None], "k": k[None, :]}
            inside = inside & evaluate(write_condition(piece.rest), **values)
        live |= inside
    return live


def rasterise(mask: Mask, shape: Shape, head: int = 0) -> npt.NDArray[np.bool_]:
    """The spans as bool[q_len, kv_len]; law 3 says this is `dense`."""
    p = np.arange(shape.q_len, dtype=np.int64) + shape.q_offset
    return live_rows(mask, p, np.arange(shape.kv_len, dtype=np.int64), shape, head)


def classify_tile(mask: Mask, shape: Shape, rows: tuple[int, int], keys: tuple[int, int],
                  head: int = 0) -> TileClass:
    """The class of the tile of query rows [r0, r1) and keys [k0, k1), cut to the call's lengths."""
    p = np.arange(rows[0], min(rows[1], shape.q_len), dtype=np.int64) + shape.q_offset
    k = np.arange(keys[0], min(keys[1], shape.kv_len), dtype=np.int64)
    live = live_rows(mask, p, k, shape, head)
    if not live.any():
        return TileClass.DEAD
    return TileClass.FULL if live.all() else TileClass.MIXED


def count_rows(mask: Mask, p: Ints, shape: Shape, head: int = 0, batch: int = 0,
               bound: Mapping[str, Any] | None = None) -> Ints:
    """Live keys of every row in `p`, int64[len(p)]; `bound` as in `names_of`, and only for masks
    whose rows are intervals."""
    pieces = spans(mask)
    if not pieces:
        return np.zeros_like(p)
    names = names_of(shape, batch, head, mask, bound)
    bounds = [row_intervals(piece, p, shape, head, names) for piece in pieces]
    if not all(piece.is_exact for piece in pieces):
        counted = count_by_classes(pieces, bounds, p, shape.kv_len, names)
        return _count_tested(mask, p, shape, head) if counted is None else counted
    lo, hi = unite_intervals(bounds)
    counts: Ints = (hi - lo).sum(axis=0)
    return counts


def _count_tested(mask: Mask, p: Ints, shape: Shape, head: int, step: int = 1 << 22) -> Ints:
    """Counting pair by pair, in slices of about `step` pairs, where intervals do not decide."""
    k = np.arange(shape.kv_len, dtype=np.int64)
    rows = max(1, step // max(1, shape.kv_len))
    parts = [live_rows(mask, p[i:i + rows], k, shape, head).sum(axis=1)
             for i in range(0, len(p), rows)]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros_like(p)


def can_count(mask: Mask, shape: Shape) -> bool:
    """Whether the rows of a call are counted without testing every pair."""
    p = np.arange(shape.q_len, dtype=np.int64) + shape.q_offset
    return is_countable(spans(mask), p, shape.kv_len)


def count_pairs(mask: Mask, shape: Shape, head: int = 0, batch: int = 0,
                bound: Mapping[str, Any] | None = None) -> int:
    """Live (query, key) pairs of one head; exact. `bound` as in `count_rows`."""
    p = np.arange(shape.q_len, dtype=np.int64) + shape.q_offset
    return int(count_rows(mask, p, shape, head, batch, bound).sum())
