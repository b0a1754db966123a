"""Closed forms: how many pairs a mask keeps, as a polynomial in the length.

For a square call of N tokens the bounds of all pieces are lines in p. Between two neighbouring
crossings of those lines (and row guards) the union of the intervals has a fixed order, so its
width is one linear function of p, and sympy sums it to a polynomial in N. For N large enough the
order of the crossings no longer changes; `valid_from` is that N.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise

import sympy

from maskdsl.expr import Mask
from maskdsl.spans import Piece, spans
from maskdsl.trace import KV_LEN, Q_LEN, TOTAL_LEN, P

N = sympy.Symbol("N", integer=True, positive=True)


@dataclass(frozen=True, slots=True)
class ClosedForm:
    """Live pairs of a square call of N tokens, for N >= valid_from."""

    pairs: sympy.Expr
    valid_from: int


def count_closed(mask: Mask) -> ClosedForm | None:
    """The closed form, or None when a bound is no line (chunks) or a rest is tested pair by pair.

    Causal() & Window(4)  -->  4*N - 6 for N >= 4
    """
    pieces = [_square(piece) for piece in spans(mask)]
    terms = [t for piece in pieces for t in (*piece.lo, *piece.hi, *piece.first, *piece.last)]
    if not all(piece.is_affine for piece in pieces) or any(t.free_symbols - {P, N} for t in terms):
        return None
    crossings = sorted_crossings(pieces)
    if crossings is None:
        return None
    places, valid_from = crossings
    total = sympy.Integer(0)
    for start, stop in pairwise(places):
        width = _width_between(pieces, start, stop, valid_from)
        if width != 0:
            total += sympy.summation(width, (P, start, stop - 1))
    return ClosedForm(sympy.expand(total), valid_from)


def _square(piece: Piece) -> Piece:
    """The piece in a square call: all lengths are N."""
    same = {KV_LEN: N, Q_LEN: N, TOTAL_LEN: N}
    lo, hi, first, last = (tuple(t.xreplace(same) for t in terms)
                           for terms in (piece.lo, piece.hi, piece.first, piece.last))
    return Piece(lo, hi, first, last, piece.rest, piece.origin)


def sorted_crossings(pieces: list[Piece]) -> tuple[list[sympy.Expr], int] | None:
    """Rows where the order of bounds may change, sorted for large N, and that N.

    Every one is a*N + b; two of them keep their order from N >= (b1 - b2) / (a2 - a1) on.
    """
    lines = {t for piece in pieces for t in (*piece.lo, *piece.hi)}
    places = {sympy.Integer(0), sympy.Integer(0) + N}
    places |= {t for piece in pieces for t in (*piece.first, *piece.last)}
    valid_from = 1
    for a, b in combinations(sorted(lines, key=sympy.default_sort_key), 2):
        gap = sympy.expand(a - b)
        slope = gap.coeff(P, 1)
        if slope != 0:
            places.add(sympy.expand((gap - slope * P) / -slope))
        elif gap.has(N):  # parallel, but which is larger depends on N
            valid_from = max(valid_from, int(abs(gap.coeff(N, 0) / gap.coeff(N, 1))) + 1)
    parts = {place: (place.coeff(N, 1), place.coeff(N, 0)) for place in map(sympy.expand, places)}
    if not all(a.is_Integer and b.is_Integer for a, b in parts.values()):
        return None
    for (a1, b1), (a2, b2) in combinations(parts.values(), 2):
        if a1 != a2:
            valid_from = max(valid_from, int(sympy.ceiling(abs((b1 - b2) / (a2 - a1)))) + 1)
    ordered = sorted(parts, key=lambda place: (parts[place][0], parts[place][1]))
    first, last = ordered.index(sympy.Integer(0)), ordered.index(N)
    return ordered[first:last + 1], valid_from


def _width_between(pieces: list[Piece], start: sympy.Expr, stop: sympy.Expr,
                   valid_from: int) -> sympy.Expr:
    """Width of the union on rows [start, stop), as a linear function of p.

    Which line is largest is the same for all these rows, so one row of one large N tells.
    """
    big = 4 * valid_from + 4
    first, last = (int(x.subs(N, big)) for x in (start, stop))
    row = {P: (first + last) // 2, N: big}
    half = {P: sympy.Rational(first + last, 2), N: big}

    def value(e: sympy.Expr) -> sympy.Expr:
        return e.xreplace(half)

    intervals = []
    for piece in pieces:
        inside = all(t.xreplace(row) <= row[P] for t in piece.first) and \
            all(t.xreplace(row) > row[P] for t in piece.last)
        lo, hi = max(piece.lo, key=value), min(piece.hi, key=value)
        if inside and value(lo) < value(hi):
            intervals.append((lo, hi))
    width, end = sympy.Integer(0), None
    for lo, hi in sorted(intervals, key=lambda pair: value(pair[0])):
        if end is None or value(lo) > value(end):
            width, end = width + hi - lo, hi
        elif value(hi) > value(end):
            width, end = width + hi - end, hi
    return sympy.expand(width)
