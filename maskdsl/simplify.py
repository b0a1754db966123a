"""Simplification: a table of laws, one line each.

Every law keeps the set of pairs (tested against dense masks) and makes the expression smaller.
"""

from __future__ import annotations

from math import gcd

from maskdsl.arguments import MAX_RUNS, runs_of
from maskdsl.atoms import (
    Causal,
    Chunk,
    Empty,
    FirstQ,
    Full,
    KeyRange,
    LastQ,
    PrefixLM,
    QueryRange,
    Sink,
    Window,
)
from maskdsl.expr import And, Mask, Not, Or
from maskdsl.periodic import Slash, Stride, Vertical
from maskdsl.rewrite import Rule, rewrite_mask
from maskdsl.spans import is_inside, spans
from maskdsl.trace import TRUE, is_traceable


def includes(big: Mask, small: Mask) -> bool:
    """Whether every pair of `small` is provably in `big`; False also when it cannot be told."""
    if not (is_traceable(big) and is_traceable(small)):
        return False
    return all(any(piece.rest == TRUE and is_inside(one, piece) for piece in spans(big))
               for one in spans(small))


def disjoint(a: Mask, b: Mask) -> bool:
    """Whether the two masks provably share no pair."""
    return is_traceable(a) and is_traceable(b) and not spans(a & b)


def _union(a: KeyRange, b: KeyRange) -> Mask | None:
    if max(a.start, b.start) > min(a.stop, b.stop):
        return None
    return KeyRange(min(a.start, b.start), max(a.stop, b.stop))


def _meet(a: KeyRange | QueryRange, b: KeyRange | QueryRange) -> Mask:
    lo, hi = max(a.start, b.start), min(a.stop, b.stop)
    return type(a)(lo, hi) if lo < hi else Empty()


def _fit(values: tuple[int, ...]) -> bool:
    """Whether one atom may hold all these values."""
    return len(runs_of(tuple(sorted(set(values))))) <= MAX_RUNS


def _hull(a: Window, b: Window) -> Window:
    return Window(max(a.left, b.left), max(a.right, b.right))


def _even(a: Stride, b: Stride) -> Mask | None:
    same = (a.offset - b.offset) % gcd(a.step, b.step) == 0
    if not same:
        return Empty()
    return a if a.step % b.step == 0 else None


RULES: tuple[Rule, ...] = (
    Rule("~Full --> Empty", Not, (Full,), lambda a: Empty()),
    Rule("~Empty --> Full", Not, (Empty,), lambda a: Full()),
    Rule("a | ~a --> Full", Or, (Mask, Not), lambda a, b: Full() if b.operand == a else None),
    Rule("a & ~a --> Empty", And, (Mask, Not), lambda a, b: Empty() if b.operand == a else None),
    Rule("Sink(a) | Sink(b) --> Sink(max(a, b))", Or, (Sink, Sink),
         lambda a, b: Sink(max(a.n, b.n))),
    Rule("Sink(a) & Sink(b) --> Sink(min(a, b))", And, (Sink, Sink),
         lambda a, b: Sink(min(a.n, b.n))),
    Rule("LastQ(a) | LastQ(b) --> LastQ(max(a, b))", Or, (LastQ, LastQ),
         lambda a, b: LastQ(max(a.n, b.n))),
    Rule("FirstQ(a) | FirstQ(b) --> FirstQ(max(a, b))", Or, (FirstQ, FirstQ),
         lambda a, b: FirstQ(max(a.n, b.n))),
    Rule("Window | Window --> Window, both non-empty on their sides", Or, (Window, Window),
         lambda a, b: _hull(a, b) if min(a.left, b.left) >= 1 else None),
    Rule("Window(a, b) & Window(c, d) --> Window(min(a, c), min(b, d))", And, (Window, Window),
         lambda a, b: Window(min(a.left, b.left), min(a.right, b.right))),
    Rule("Causal & Window(a, b) --> Window(a)", And, (Causal, Window),
         lambda a, b: Window(b.left) if b.right else None),
    Rule("Causal & PrefixLM(n) --> Causal", And, (Causal, PrefixLM), lambda a, b: a),
    Rule("Causal | Sink(n) --> PrefixLM(n)", Or, (Causal, Sink),
         lambda a, b: PrefixLM(b.n) if b.n else a),
    Rule("KeyRange | KeyRange --> KeyRange, where they meet", Or, (KeyRange, KeyRange),
         _union),
    Rule("KeyRange & KeyRange --> their meet", And, (KeyRange, KeyRange), _meet),
    Rule("QueryRange & QueryRange --> their meet", And, (QueryRange, QueryRange), _meet),
    Rule("Chunk(a) & Chunk(b) --> Chunk(a), where a divides b", And, (Chunk, Chunk),
         lambda a, b: a if b.size % a.size == 0 else None),
    Rule("Chunk(a) | Chunk(b) --> Chunk(b), where a divides b", Or, (Chunk, Chunk),
         lambda a, b: b if b.size % a.size == 0 else None),
    Rule("Stride(a) & Stride(b) --> the coarser, or Empty", And, (Stride, Stride), _even),
    Rule("Vertical(a) | Vertical(b) --> Vertical(a + b)", Or, (Vertical, Vertical),
         lambda a, b: Vertical(a.columns + b.columns) if _fit(a.columns + b.columns) else None),
    Rule("Slash(a) | Slash(b) --> Slash(a + b)", Or, (Slash, Slash),
         lambda a, b: Slash(a.offsets + b.offsets) if _fit(a.offsets + b.offsets) else None),
    # The general laws, proved on the geometry, come last: they cost more to try.
    Rule("a | b --> b, where a is inside b", Or, (Mask, Mask),
         lambda a, b: b if includes(b, a) else None),
    Rule("a & b --> a, where a is inside b", And, (Mask, Mask),
         lambda a, b: a if includes(b, a) else None),
    Rule("a & b --> Empty, where they share nothing", And, (Mask, Mask),
         lambda a, b: Empty() if disjoint(a, b) else None),
)


def simplify(mask: Mask, fired: list[str] | None = None) -> Mask:
    """An equal, smaller mask; `fired` gets the laws that were used, in order.

    >>> from maskdsl.atoms import Causal, Sink, Window
    >>> simplify(Sink(4) | Sink(8) | Window(16) & Causal())
    Sink(8) | Window(16)
    """
    return rewrite_mask(mask, RULES, fired)
