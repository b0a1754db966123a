"""Interval arithmetic over tiles: may this key tile hold a live pair?

Pieces with a `rest` (k % 256 == 0, random blocks) have wide hulls with many dead tiles. Instead
of listing the live ones in memory, the masked loop asks each tile: the extremes of every
comparison over the tile, in scalar arithmetic. Sound (no live tile is skipped), and exact except
where a tile crosses the border of a period.
"""

from __future__ import annotations

import sympy

from maskdsl.codegen.bounds import P_FIRST, P_LAST, Lines, TileRange
from maskdsl.codegen.plan import Sieve
from maskdsl.spans import Piece
from maskdsl.text import write_integer
from maskdsl.trace import FALSE, TRUE, All, Condition, Ge, Has, K, Lookup, P

Extremes = tuple[str, str]  # text of the smallest and of the largest value


class _Unknown(Exception):
    """Internal: no extremes can be told."""


class SieveWriter:
    """Writes the test; text without k goes to `setup`, which runs once per query tile."""

    def __init__(self) -> None:
        self.setup, self.lines = Lines(), Lines()
        self.known: dict[sympy.Expr, Extremes] = {}

    def may_hold(self, condition: Condition) -> str:
        """Text of a test, true wherever a pair of the tile meets the condition; '' = always."""
        if condition == TRUE:
            return ""
        if condition == FALSE:
            return "False"
        if isinstance(condition, Has):
            return ""
        if isinstance(condition, Ge):
            try:
                return f"({self.extremes(condition.value)[1]} >= 0)"
            except _Unknown:
                return ""
        tests = [self.may_hold(arg) for arg in condition.args]
        if isinstance(condition, All):
            return _join(" & ", [t for t in tests if t])
        return "" if "" in tests else _join(" | ", tests)

    def extremes(self, e: sympy.Expr) -> Extremes:
        """(smallest, largest) value of `e` over the tile, each a name or a number."""
        if e not in self.known:
            low, high = self._extremes(e)
            lines = self.lines if e.has(K) else self.setup
            i = len(self.known)
            same = low == high
            low = lines.set(f"low{i}", low)
            self.known[e] = (low, low if same else lines.set(f"high{i}", high))
        return self.known[e]

    def _extremes(self, e: sympy.Expr) -> Extremes:
        if e == P:
            return "p_first", "p_last"
        if e == K:
            return "start", "stop"
        if not e.has(P, K):
            text = write_integer(e)
            return text, text
        if e.is_Add:
            parts = [self.extremes(a) for a in e.args]
            return " + ".join(a for a, _ in parts), " + ".join(b for _, b in parts)
        if e.is_Mul or e.is_Pow:
            return self._product(e)
        if e.func == sympy.floor:
            over, under = sympy.fraction(sympy.together(e.args[0]))
            low, high = self.extremes(over)
            by = write_integer(under)
            return f"floor_div({low}, {by})", f"floor_div({high}, {by})"
        if e.func == Lookup:
            return (write_integer(e.xreplace({P: P_FIRST})),
                    write_integer(e.xreplace({P: P_LAST})))
        if e.func == sympy.Mod:
            return self._remainder(*e.args)
        if e.func in (sympy.Max, sympy.Min):
            name = "tl.maximum" if e.func == sympy.Max else "tl.minimum"
            (a, b), (c, d) = (self.extremes(arg) for arg in e.args[:2])
            if len(e.args) == 2:
                return f"{name}({a}, {c})", f"{name}({b}, {d})"
        raise _Unknown

    def _product(self, e: sympy.Expr) -> Extremes:
        scale, rest = e.as_coeff_Mul()
        if rest != e:
            low, high = self.extremes(rest)
            low, high = f"({low}) * {scale}", f"({high}) * {scale}"
            return (low, high) if scale > 0 else (high, low)
        factors = [e.base] * int(e.exp) if e.is_Pow else list(e.args)
        if not all(f.is_nonnegative for f in factors):
            raise _Unknown
        parts = [self.extremes(f) for f in factors]
        return " * ".join(a for a, _ in parts), " * ".join(b for _, b in parts)

    def _remainder(self, value: sympy.Expr, period: sympy.Expr) -> Extremes:
        """Inside one period the remainder is monotone; across a border it may be anything."""
        low, high = self.extremes(value)
        by = self.extremes(period)[0]
        if low == high:
            return f"modulo({low}, {by})", f"modulo({low}, {by})"
        same = f"floor_div({low}, {by}) == floor_div({high}, {by})"
        return (f"tl.where({same}, modulo({low}, {by}), 0)",
                f"tl.where({same}, modulo({high}, {by}), {by} - 1)")


def _join(sign: str, tests: list[str]) -> str:
    return tests[0] if len(tests) == 1 else f"({sign.join(tests)})" if tests else ""


def write_sieve(pieces: tuple[Piece, ...], ranges: list[TileRange]) -> Sieve | None:
    """The dead-tile test over all pieces, or None where it could never say "dead"."""
    writer = SieveWriter()
    tests = []
    for piece, span in zip(pieces, ranges, strict=True):
        inside = [f"(tile < {span.stop})"]
        if span.start != "0":
            inside.insert(0, f"(tile >= {span.start})")
        test = writer.may_hold(piece.rest)
        if test:
            inside.append(test)
        tests.append(_join(" & ", inside))
    if all(piece.is_exact for piece in pieces):
        return None
    return Sieve(tuple(writer.setup.text), tuple(writer.lines.text), _join(" | ", tests))
