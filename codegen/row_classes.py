"""Which keys which rows see, in words: the rows of a call by the pieces they have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import sympy

from maskdsl.codegen.plan import Plan
from maskdsl.codegen.visits import count_steps
from maskdsl.codegen.words import describe_keys
from maskdsl.shape import Shape
from maskdsl.spans import spans
from maskdsl.text import evaluate, write_integer
from maskdsl.tiles import Ints, names_of
from maskdsl.trace import is_traceable

MOST = 12  # classes told one by one


@dataclass(frozen=True, slots=True)
class RowClass:
    """Rows of a call that see the same pieces of a mask.

    first, stop  query rows [first, stop), counted from 0
    keys         the keys of each piece, in words
    items        query tiles whose last row is among them; full, masked: the key tiles these visit
                 in the static loops, for one head; listed: steps that call-time data adds
    """

    first: int
    stop: int
    keys: tuple[str, ...]
    items: int
    full: int
    masked: int
    listed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self) | {"keys": list(self.keys)}


def classify_rows(plan: Plan, shape: Shape, steps: Mapping[str, Ints] | None = None,
                  bound: Mapping[str, Any] | None = None) -> tuple[RowClass, ...]:
    """The classes of rows of one call, in order; at most MOST of them, the last one then stands for
    all that follow.

    steps  of every query tile, as `count_steps` gives them; default: those of the portable kernel
           without data
    bound  the data of the mask's slots for batch entry and head 0; None: prefixes count as empty,
           all tokens as one document
    """
    if not shape.q_len:
        return ()
    pieces = spans(plan.mask) if is_traceable(plan.mask) else plan.pieces
    names = names_of(shape, 0, 0, plan.mask, bound)
    end = shape.q_offset + shape.q_len
    guards = [(_number(piece.first, names, max, shape.q_offset),
               _number(piece.last, names, min, end)) for piece in pieces]
    edges = sorted({shape.q_offset, end, *(x for pair in guards for x in pair
                                           if shape.q_offset < x < end)})
    more = len(edges) - 1 > MOST
    edges = [*edges[:MOST], end] if more else edges
    steps = count_steps(plan, shape) if steps is None else steps
    tiles = len(steps["full"])
    last = shape.q_offset + np.minimum(np.arange(1, tiles + 1) * plan.block_m, shape.q_len) - 1
    found = []
    for a, b in pairwise(edges):
        here = (last >= a) & (last < b)
        keys = tuple(dict.fromkeys(describe_keys(piece) for piece, (first, stop) in
                                   zip(pieces, guards, strict=True) if first < b and stop > a))
        if more and b == end:
            keys = ("many classes of rows, not told one by one",)
        counts = {name: int(count[here].sum()) for name, count in steps.items()}
        full, masked = counts.pop("full"), counts.pop("masked")
        found.append(RowClass(a - shape.q_offset, b - shape.q_offset, keys, int(here.sum()), full,
                              masked, sum(counts.values())))
    return tuple(found)


def _number(terms: tuple[sympy.Expr, ...], names: dict[str, Any], extreme: Any,
            default: int) -> int:
    """The value of a row guard at the lengths of a call."""
    return int(extreme([default, *(int(np.max(evaluate(write_integer(t), **names)))
                                   for t in terms)]))
