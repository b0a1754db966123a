"""Which keys which rows see, in words: the rows of a call by the pieces they have."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import sympy

from maskdsl.codegen.bounds import describe_piece
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.visits import static_steps
from maskdsl.codegen.writer import leaves_of
from maskdsl.shape import Shape
from maskdsl.spans import ZERO, Piece, spans
from maskdsl.text import write_integer
from maskdsl.tiles import Ints, evaluate, names_of
from maskdsl.trace import KV_LEN, Has, P, is_traceable

MOST = 12  # classes told one by one


@dataclass(frozen=True, slots=True)
class RowClass:
    """Rows of a call that see the same pieces of a mask.

    first, stop  query rows [first, stop), counted from 0
    keys         the keys of each piece, in words
    items        query tiles whose last row is among them; full, masked: the key tiles these visit
                 in the static loops, for one head
    """

    first: int
    stop: int
    keys: tuple[str, ...]
    items: int
    full: int
    masked: int

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self) | {"keys": list(self.keys)}


def classify_rows(plan: Plan, shape: Shape,
                  steps: tuple[Ints, Ints] | None = None) -> tuple[RowClass, ...]:
    """The classes of rows of one call, in order; at most MOST of them, the last one then stands for
    all that follow. Prefixes count as empty, all tokens as one document.

    steps  (full, masked) tiles of every query tile; default: those of the portable kernel's loops
    """
    if not shape.q_len:
        return ()
    pieces = spans(plan.mask) if is_traceable(plan.mask) else plan.pieces
    names = names_of(shape, 0, 0, plan.mask)
    end = shape.q_offset + shape.q_len
    guards = [(_number(piece.first, names, max, shape.q_offset),
               _number(piece.last, names, min, end)) for piece in pieces]
    edges = sorted({shape.q_offset, end, *(x for pair in guards for x in pair
                                           if shape.q_offset < x < end)})
    more = len(edges) - 1 > MOST
    edges = [*edges[:MOST], end] if more else edges
    values = plan.run_bounds(shape)
    full, masked = static_steps(plan, shape, values) if steps is None else steps
    found = []
    for a, b in pairwise(edges):
        here = (values["p_last"] >= a) & (values["p_last"] < b)
        keys = tuple(dict.fromkeys(describe_keys(piece) for piece, (first, stop) in
                                   zip(pieces, guards, strict=True) if first < b and stop > a))
        if more and b == end:
            keys = ("many classes of rows, not told one by one",)
        found.append(RowClass(a - shape.q_offset, b - shape.q_offset, keys, int(here.sum()),
                              int(full[here].sum()), int(masked[here].sum())))
    return tuple(found)


def _number(terms: tuple[sympy.Expr, ...], names: dict[str, Any], extreme: Any,
            default: int) -> int:
    """The value of a row guard at the lengths of a call."""
    return int(extreme([default, *(int(np.max(evaluate(write_integer(t), **names)))
                                   for t in terms)]))


def describe_keys(piece: Piece) -> str:
    """The keys of a piece, as people say it; odd bounds as they are computed.

    [max(0, p - 2047), min(kv_len, p + 1))  -->  'the last 2,048 keys up to p'
    """
    lower = [t for t in piece.lo if t != ZERO]
    upper = [t for t in piece.hi if t != KV_LEN]
    causal = P + 1 in upper
    bound = [t for t in upper if t != P + 1]
    until = " up to p" if causal else ""
    if not lower and not bound:
        text = "all keys" + until
    elif not lower and len(bound) == 1 and bound[0].is_Integer:
        text = f"the first {int(bound[0]):,} keys{until}"
    elif len(lower) == 1 and not bound and causal and (P - lower[0]).is_Integer:
        text = f"the last {int(P - lower[0]) + 1:,} keys up to p"
    elif len(lower) == len(upper) == 1 and (upper[0] - lower[0]).is_Integer and \
            (P - lower[0]).is_Integer:
        first, last = int(lower[0] - P), int(upper[0] - P) - 1
        text = f"keys p {_signed(first)} to p {_signed(last)}"
    else:
        text = describe_piece(Piece(piece.lo, piece.hi)).split(": ", 1)[1]
    listed = list(leaves_of(piece.rest))
    if isinstance(piece.rest, Has):
        verb = "lists" if piece.rest.held else "does not list"
        return f"{text} that {piece.rest.atom!r} {verb}"
    if listed:
        return f"{text}, tested with {', '.join(sorted({repr(x.atom) for x in listed}))}"
    return text if piece.is_exact else f"{text}, tested pair by pair"


def _signed(number: int) -> str:
    return f"+ {number:,}" if number >= 0 else f"- {-number:,}"
