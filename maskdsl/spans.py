"""Geometry: a mask as a union of pieces, each a key interval per query row.

A piece is {(p, k) : first <= p < last, lo(p) <= k < hi(p)}: `lo` the largest of some terms, `hi`
the smallest of some terms, every term non-decreasing in p (p + 1, 64 * floor(p / 64), 128,
kv_len, ...). Monotone bounds are what lets a kernel read a tile's extent off its first and last
row, with no table. Intersection concatenates terms; union concatenates pieces.

What no interval can say (k % 8 == 0, an opaque function) stays in a piece as `rest`, conditions
to be tested pair by pair inside the interval.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import sympy

from maskdsl.expr import And, Mask, Not, Or
from maskdsl.trace import (
    FALSE,
    KV_LEN,
    TOTAL_LEN,
    TRUE,
    Any_,
    Condition,
    Ge,
    Has,
    K,
    Lookup,
    P,
    conjoin,
    disjoin,
    negate,
    trace,
)

MAX_PIECES = 6  # more are drawn together into a hull with a `rest`; a kernel stays readable
MIN_TILE = 16  # the narrowest key tile, in tokens
ZERO = sympy.Integer(0)
Terms = tuple[sympy.Expr, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """{(p, k) : max(first) <= p < min(last), max(lo) <= k < min(hi), rest}; bounds in tokens."""

    lo: Terms = (ZERO,)
    hi: Terms = (KV_LEN,)
    first: Terms = ()
    last: Terms = ()
    rest: Condition = TRUE
    origin: tuple[str, ...] = ()  # the sub-expressions it comes from, for comments

    @property
    def is_exact(self) -> bool:
        """Whether the interval alone decides."""
        return self.rest == TRUE

    def fills(self, block: int) -> bool:
        """Whether its interval can hold a whole tile of `block` keys for several rows."""
        return self.is_exact and not self.is_narrower(block)

    def is_narrower(self, size: int) -> bool:
        """Whether the interval is provably shorter than `size` keys."""
        widths = [h - x for x in self.lo for h in self.hi]
        return any(bool(w.is_Integer and w < size) for w in widths)

    @property
    def is_affine(self) -> bool:
        """Whether every bound has slope 0 or 1 in p: then its tile hull holds no dead tile."""
        return self.is_exact and all(
            t.coeff(P, 1) in (0, 1) and not (t - t.coeff(P, 1) * P).has(P)
            for t in self.lo + self.hi)


def is_at_most(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether a <= b is proved, for every p and length: their difference is a number."""
    if b == TOTAL_LEN and a == KV_LEN:
        return True
    difference = b - a
    return bool(difference.is_Integer and difference >= 0)


def keep_largest(terms: Iterable[sympy.Expr]) -> Terms:
    """max(terms) without the terms another one covers, sorted."""
    unique = sorted(set(terms), key=sympy.default_sort_key)
    return tuple(t for t in unique if not any(o != t and is_at_most(t, o) for o in unique))


def keep_smallest(terms: Iterable[sympy.Expr]) -> Terms:
    """min(terms) without the terms another one covers, sorted."""
    unique = sorted(set(terms), key=sympy.default_sort_key)
    return tuple(t for t in unique if not any(o != t and is_at_most(o, t) for o in unique))


def intersect(a: Piece, b: Piece) -> Piece | None:
    """The pairs in both; None when that is provably nothing."""
    lo, hi = keep_largest(a.lo + b.lo), keep_smallest(a.hi + b.hi)
    first, last = keep_largest(a.first + b.first), keep_smallest(a.last + b.last)
    if any(is_at_most(h, x) for x in lo for h in hi):
        return None
    if any(is_at_most(z, x) for x in first for z in last):
        return None
    rest = conjoin(a.rest, b.rest)
    origin = tuple(sorted({*a.origin, *b.origin}))
    return None if rest == FALSE else Piece(lo, hi, first, last, rest, origin)


def is_inside(a: Piece, b: Piece) -> bool:
    """Whether every pair of `a` is provably in `b`: each bound of b follows from one of a."""
    return (
        (b.is_exact or a.rest == b.rest)
        and all(any(is_at_most(y, x) for x in a.lo) for y in b.lo)
        and all(any(is_at_most(x, y) for x in a.hi) for y in b.hi)
        and all(any(is_at_most(y, x) for x in a.first) for y in b.first)
        and all(any(is_at_most(x, y) for x in a.last) for y in b.last)
    )


def drop_covered(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """The union without pieces that lie inside another one."""
    kept: list[Piece] = []
    for piece in pieces:
        if any(is_inside(piece, other) for other in kept):
            continue
        kept = [other for other in kept if not is_inside(other, piece)]
        kept.append(piece)
    return tuple(kept)


# --- one comparison -> one piece --------------------------------------------------------------


def is_monotone(f: sympy.Expr) -> bool:
    """Whether f has no k and never falls as p grows: c + p, c + n*floor(p/m)."""
    for term in sympy.Add.make_args(f):
        if not term.has(P):
            continue
        scale, rest = term.as_coeff_Mul()
        if not scale.is_Integer or scale < 0:
            return False
        if rest.func == Lookup:
            if rest.args[1] != P:
                return False
        elif rest != P and not (rest.func == sympy.floor and _is_line(rest.args[0])):
            return False
    return not f.has(K, sympy.Mod)


def _is_line(f: sympy.Expr) -> bool:
    """Whether f = a*p + c with a > 0 and c free of p."""
    slope = f.coeff(P, 1)
    return bool(slope.is_Rational and slope > 0 and not (f - slope * P).has(P, K))


def solve_comparison(leaf: Ge) -> Piece | None:
    """The piece of one comparison, or None when it is not an interval of keys or of rows.

    The piece may be void, [0, 0).

    p - k >= 0  -->  k < p + 1;   k - 64*floor(p/64) >= 0  -->  lo = 64*floor(p/64).
    """
    e = sympy.expand(leaf.value)
    if not e.has(K):
        return _solve_rows(e)
    scale, step = _key_term(e)
    if scale == 0:
        return None
    rest = e - scale * (K if step == 1 else sympy.floor(K / step))
    bound = -rest if scale == 1 else rest  # k_ >= bound, or k_ <= bound, k_ = k // step
    if not is_monotone(bound) or bound.has(K):
        return None
    if scale == 1:
        return Piece(lo=keep_largest((ZERO, sympy.expand(step * bound))))
    return Piece(hi=keep_smallest((KV_LEN, sympy.expand(step * (bound + 1)))))


def _key_term(e: sympy.Expr) -> tuple[int, int]:
    """(+-1, step) when k enters e only as +-floor(k / step); (0, 1) otherwise."""
    with_key = [t for t in sympy.Add.make_args(e) if t.has(K)]
    if len(with_key) != 1:
        return 0, 1
    scale, rest = with_key[0].as_coeff_Mul()
    if scale not in (1, -1):
        return 0, 1
    if rest == K:
        return int(scale), 1
    if rest.func == sympy.floor and (ratio := rest.args[0] / K).is_Rational and ratio.p == 1:
        return int(scale), int(ratio.q)
    return 0, 1


def _solve_rows(e: sympy.Expr) -> Piece | None:
    """A comparison without k: p >= a, or p < b, with a and b free of p."""
    slope = e.coeff(P, 1)
    rest = sympy.expand(e - slope * P)
    if slope not in (1, -1) or rest.has(P, sympy.Mod, sympy.floor, Lookup):
        return None
    return Piece(first=(-rest,)) if slope == 1 else Piece(last=(rest + 1,))


# --- a condition, a mask -> pieces --------------------------------------------------------------


def split_condition(condition: Condition, origin: tuple[str, ...]) -> tuple[Piece, ...]:
    """A traced condition as pieces; what is no interval becomes a `rest`."""
    if isinstance(condition, Ge):
        piece = solve_comparison(condition)
        if piece is None:
            piece = Piece(rest=condition)
        return () if _is_void(piece) else (_named(piece, origin),)
    if isinstance(condition, Has):
        return (Piece(rest=condition, origin=origin),)
    parts = [split_condition(arg, origin) for arg in condition.args]
    if isinstance(condition, Any_):
        return unite_pieces(parts, origin)
    return cross_pieces(parts, origin)


def _is_void(piece: Piece) -> bool:
    return any(is_at_most(h, x) for x in piece.lo for h in piece.hi)


def _named(piece: Piece, origin: tuple[str, ...]) -> Piece:
    return Piece(piece.lo, piece.hi, piece.first, piece.last, piece.rest, origin)


def unite_pieces(parts: list[tuple[Piece, ...]], origin: tuple[str, ...]) -> tuple[Piece, ...]:
    """The union of `parts`: their pieces side by side."""
    return limit_pieces(drop_covered(piece for part in parts for piece in part), origin)


def cross_pieces(parts: list[tuple[Piece, ...]], origin: tuple[str, ...]) -> tuple[Piece, ...]:
    """The intersection of `parts`: (a | b) & c  -->  (a & c) | (b & c)."""
    result: tuple[Piece, ...] = (Piece(),)
    for part in sorted(parts, key=len):
        both = (intersect(a, b) for a in result for b in part)
        result = drop_covered(piece for piece in both if piece is not None)
    return limit_pieces(result, origin)


def limit_pieces(pieces: tuple[Piece, ...], origin: tuple[str, ...]) -> tuple[Piece, ...]:
    """At most MAX_PIECES: those that are tested pair by pair anyway are drawn together first, then
    the narrow ones, then all."""
    tested = {piece for piece in pieces if not piece.is_exact}
    narrow = {piece for piece in pieces if piece.is_narrower(MIN_TILE)}
    for group in (tested, tested | narrow, set(pieces)):
        if len(pieces) <= MAX_PIECES:
            break
        chosen = [piece for piece in pieces if piece in group or not piece.is_exact]
        if len(chosen) > 1:
            kept = tuple(piece for piece in pieces if piece not in chosen)
            pieces = (*kept, enclose_pieces(chosen, origin))
    return pieces


def enclose_pieces(pieces: list[Piece], origin: tuple[str, ...]) -> Piece:
    """One piece around many: the bounds all of them obey; what else each asks is its `rest`."""
    lo = [t for t in pieces[0].lo if all(any(is_at_most(t, x) for x in o.lo) for o in pieces)]
    hi = [t for t in pieces[0].hi if all(any(is_at_most(x, t) for x in o.hi) for o in pieces)]
    lowest, highest = (numbers_of([getattr(p, side) for p in pieces]) for side in ("lo", "hi"))
    rest = disjoin(*(ask_beyond(piece, lo, hi) for piece in pieces))
    return Piece(keep_largest([ZERO, *lo, *lowest[:1]]),
                 keep_smallest([KV_LEN, *hi, *highest[-1:]]), rest=rest, origin=origin)


def ask_beyond(piece: Piece, lo: list[sympy.Expr], hi: list[sympy.Expr]) -> Condition:
    """What the piece asks of a pair beyond bounds that are known to hold."""
    lower = [Ge(K - t) for t in piece.lo if t not in (*lo, ZERO)]
    upper = [Ge(t - K - 1) for t in piece.hi if t not in (*hi, KV_LEN)]
    rows = [*(Ge(P - t) for t in piece.first), *(Ge(t - P - 1) for t in piece.last)]
    return conjoin(*lower, *upper, *rows, piece.rest)


def numbers_of(bounds: list[Terms]) -> list[sympy.Expr]:
    """The constant bound of every piece, sorted; nothing unless each has one."""
    numbers = [[t for t in terms if t.is_Integer] for terms in bounds]
    return sorted(n[0] for n in numbers) if all(numbers) else []


@lru_cache(maxsize=1024)
def spans(mask: Mask) -> tuple[Piece, ...]:
    """The mask as a union of at most MAX_PIECES pieces (which may overlap).

    Window(4) & Causal()  -->  [max(0, p - 3), min(p + 1, kv_len))
    """
    if isinstance(mask, (Or, And)):
        below = [spans(arg) for arg in mask.args]
        return (unite_pieces if isinstance(mask, Or) else cross_pieces)(below, _atoms(mask))
    if isinstance(mask, Not) and isinstance(mask.operand, (Or, And)):
        flipped = tuple(~arg for arg in mask.operand.args)
        return spans((And if isinstance(mask.operand, Or) else Or)(flipped))
    condition = negate(trace(mask.operand)) if isinstance(mask, Not) else trace(mask)
    return split_condition(condition, (repr(mask),))


def _atoms(mask: Mask) -> tuple[str, ...]:
    leaves = (node for node in mask.walk() if not isinstance(node, (Or, And, Not)))
    return tuple(sorted(map(repr, leaves)))
