"""From a mask_mod to an expression: conditions read back as atoms.

`Where(fn)` already compiles a function that can be traced. What this file adds is a value: atoms
have a repr, JSON, a hash that is equal in every process, and laws that simplify them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy

from maskdsl.arguments import MAX_SIZE
from maskdsl.atoms import (
    Band,
    Causal,
    Chunk,
    Empty,
    FirstQ,
    Full,
    KeyRange,
    QueryRange,
    Sink,
    Window,
)
from maskdsl.errors import TraceError
from maskdsl.expr import And, Mask, Or, join
from maskdsl.periodic import Stride
from maskdsl.simplify import simplify
from maskdsl.trace import All, Any_, Condition, Ge, K, P, trace
from maskdsl.where import Where


def from_mask_mod(mask_mod: Callable[[Any, Any, Any, Any], Any]) -> Mask:
    """The expression of a FlexAttention `mask_mod(b, h, q_idx, kv_idx) -> bool`.

    Comparisons of q_idx, kv_idx and constants, with + - * // %, joined by & | ^ ~ (or `and_masks`
    and `or_masks`) become atoms. A function that says something atoms cannot, or that cannot be
    traced because it reads a tensor, becomes `Where(mask_mod)`.

    The function is read once: numbers that it closes over must not change afterwards.

    Exact for the lengths kernels count, up to 2**29 tokens. MaskDSLError where `mask_mod` is no
    function of four arguments.

    >>> from_mask_mod(lambda b, h, q, k: (q >= k) & (q - k <= 8))
    Window(9)
    >>> from_mask_mod(lambda b, h, q, k: (k < 4) | (q // 64 == k // 64))
    Chunk(64) | Sink(4)
    """
    opaque = Where(mask_mod)
    if isinstance(known := getattr(mask_mod, "mask", None), Mask) and \
            not getattr(mask_mod, "offset", 0):
        return known  # one of ours, from `Mask.mask_mod`
    try:
        return simplify(read_condition(trace(opaque)))
    except (TraceError, _Unread):
        return opaque


class _Unread(Exception):
    """Internal: no atom says this."""


def read_condition(condition: Condition) -> Mask:
    """A traced condition as a mask of atoms, or _Unread."""
    if isinstance(condition, Ge):
        return read_comparison(sympy.expand(condition.value))
    if not isinstance(condition, (All, Any_)):
        raise _Unread
    alone, pairs = split_pairs(condition)
    both = isinstance(condition, All)
    parts = [read_condition(arg) for arg in alone]
    parts += [read_equality(e) if both else ~read_equality(e) for e in pairs]
    if not parts:
        return Full() if both else Empty()
    return join(And, tuple(parts)) if both else join(Or, tuple(parts))


def split_pairs(condition: All | Any_) -> tuple[list[Condition], list[sympy.Expr]]:
    """(other conditions, e of every `e == 0` in an All, or of every `e != 0` in an Any_).

    e >= 0 and -e >= 0  -->  e == 0;   e - 1 >= 0 or -e - 1 >= 0  -->  e != 0
    """
    shift = 0 if isinstance(condition, All) else 1
    alone: list[Condition] = []
    pairs: list[sympy.Expr] = []
    waiting: dict[sympy.Expr, Ge] = {}
    for arg in condition.args:
        if not isinstance(arg, Ge):
            alone.append(arg)
            continue
        value = sympy.expand(arg.value + shift)
        if waiting.pop(sympy.expand(-value), None) is not None:
            pairs.append(value)
        else:
            waiting[value] = arg
    return [*alone, *waiting.values()], pairs


def slopes(e: sympy.Expr) -> tuple[int, int, int]:
    """(a, b, c) of e = a*p + b*k + c with numbers a, b, c; _Unread where it is no such line."""
    a, b = e.coeff(P, 1), e.coeff(K, 1)
    c = sympy.expand(e - a * P - b * K)
    if not (a.is_Integer and b.is_Integer and c.is_Integer):
        raise _Unread
    return int(a), int(b), int(c)


def read_comparison(e: sympy.Expr) -> Mask:
    """`e >= 0` as a mask.

    p - k >= 0  -->  Causal();   8 - p + k >= 0  -->  Window(9, far);   3 - k >= 0  -->  Sink(4)
    """
    if (size := chunk_size(e)) is not None:  # block of p >= block of k
        return Causal() | Chunk(size)
    if (size := chunk_size(-e)) is not None:
        return ~Causal() | Chunk(size)
    if (period := _period(-e)) is not None and period[1] == 0:  # k % n <= 0
        return Stride(period[0])
    a, b, c = slopes(e)
    match a, b:
        case 1, -1:  # k - p <= c
            return Causal() if c == 0 else \
                Window(MAX_SIZE, c) if c > 0 else ~Window(-c, MAX_SIZE)
        case -1, 1:  # p - k <= c
            return Window(c + 1, MAX_SIZE) if c >= 0 else ~Causal() if c == -1 else \
                ~Window(MAX_SIZE, -c - 1)
        case 0, -1:
            return Sink(c + 1) if c >= 0 else Empty()
        case 0, 1:
            return ~Sink(-c) if c < 0 else Full()
        case 1, 0 if c <= 0:
            return ~FirstQ(-c) if c else Full()
        case -1, 0 if c >= -1:
            return FirstQ(c + 1)
    raise _Unread


def read_equality(e: sympy.Expr) -> Mask:
    """`e == 0` as a mask: a chunk, a stride, a diagonal, one key or one query."""
    for value in (e, sympy.expand(-e)):
        if (size := chunk_size(value)) is not None:
            return Chunk(size)
        if (period := _period(value)) is not None:
            step, offset = period
            return Stride(step, offset) if 0 <= offset < step else Empty()
    a, b, c = slopes(e)
    if a < 0 or (a == 0 and b < 0):
        a, b, c = -a, -b, -c
    match a, b:
        case 1, -1:  # p - k == -c
            return Band(-c)
        case 0, 1 if c <= 0:
            return KeyRange(-c, 1 - c)
        case 1, 0 if c <= 0:
            return QueryRange(-c, 1 - c)
    raise _Unread


def chunk_size(e: sympy.Expr) -> int | None:
    """n where e is p // n - k // n."""
    if not e.has(sympy.floor):
        return None
    found = [x for x in e.atoms(sympy.floor) if x.has(P)]
    if len(found) != 1:
        return None
    ratio = found[0].args[0] / P
    if not (ratio.is_Rational and ratio.p == 1):
        return None
    size = int(ratio.q)
    return size if sympy.expand(e - found[0] + sympy.floor(K / size)) == 0 else None


def _period(e: sympy.Expr) -> tuple[int, int] | None:
    """(n, c) where e is k % n - c."""
    found = list(e.atoms(sympy.Mod))
    if len(found) != 1 or found[0].args[0] != K or not found[0].args[1].is_Integer:
        return None
    rest = sympy.expand(e - found[0])
    return (int(found[0].args[1]), -int(rest)) if rest.is_Integer else None
