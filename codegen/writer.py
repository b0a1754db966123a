"""The text of one tile's mask: per-row bounds, then one condition on `p` (a column), `k` (a row).

Row bounds are [BLOCK_M, 1] and cost nothing in the loop; what remains for each pair is a compare
a bound. Prefixes share one bound: [0, a) | [0, b)  -->  k < max(a, b).
"""

from __future__ import annotations

from collections.abc import Iterator

import sympy

from maskdsl.codegen.bounds import Lines
from maskdsl.codegen.listing import ListedTest
from maskdsl.spans import ZERO, Piece
from maskdsl.text import write_condition, write_integer
from maskdsl.trace import Condition, Ge, Has, K, P, all_leaves


def write_mask(pieces: tuple[Piece, ...]) -> tuple[tuple[str, ...], tuple[str, ...],
                                                   tuple[ListedTest, ...]]:
    """Pieces -> (row bound lines, tests, those that ask call-time lists); a pair is live when one
    test of bool[BLOCK_M, BLOCK_N] holds."""
    lines = Lines()
    prefixes = [p for p in pieces if p.lo == (ZERO,) and p.is_exact]
    tests = [f"(k < {_prefix_bound(lines, prefixes)})"] if prefixes else []
    listed = []
    for i, piece in enumerate(p for p in pieces if p not in prefixes):
        lo, hi, test = _interval_test(lines, i, piece)
        tests.append(test)
        if list(leaves_of(piece.rest)):
            alone = piece.rest.atom if isinstance(piece.rest, Has) and piece.rest.held else None
            listed.append(ListedTest(test, lo, hi, alone))
    return tuple(lines.text), tuple(tests) or ("(k < 0)",), tuple(listed)


def leaves_of(condition: Condition) -> Iterator[Has]:
    """The leaves of a condition that ask call-time lists."""
    return (leaf for leaf in all_leaves(condition) if isinstance(leaf, Has))


def _upper(piece: Piece) -> str:
    """The upper bound of the piece's rows; 0 on rows it does not have."""
    hi = write_integer(sympy.Min(*piece.hi))
    guards = [f"(p >= {write_integer(sympy.Max(*piece.first))})"] if piece.first else []
    if piece.last:
        guards.append(f"(p < {write_integer(sympy.Min(*piece.last))})")
    return f"tl.where({' & '.join(guards)}, {hi}, 0)" if guards else hi


def _prefix_bound(lines: Lines, pieces: list[Piece]) -> str:
    text = _upper(pieces[-1])
    for piece in reversed(pieces[:-1]):
        text = f"tl.maximum({_upper(piece)}, {text})"
    return lines.set("prefix", text)


def _interval_test(lines: Lines, i: int, piece: Piece) -> tuple[str, str, str]:
    """The names of a piece's row bounds, and its whole test."""
    lo, hi = "0", lines.set(f"upper{i}", _upper(piece))
    tests = [f"(k < {hi})"]
    if piece.lo != (ZERO,):
        lo = lines.set(f"lower{i}", write_integer(sympy.Max(*piece.lo)))
        tests.insert(0, f"(k >= {lo})")
    if not piece.is_exact:
        names: dict[sympy.Expr, str] = {}
        tests.append(f"({write_condition(name_rows(lines, piece.rest, names), names)})")
    return lo, hi, f"({' & '.join(tests)})"


def name_rows(lines: Lines, condition: Condition, names: dict[sympy.Expr, str]) -> Condition:
    """Name what costs a division and depends on the row alone, so the loop does not repeat it.

    k % 4 >= p % 4  -->  row0 = p % 4 before the loop, and k % 4 >= row0 in it
    """
    if isinstance(condition, Has):
        return condition
    if not isinstance(condition, Ge):
        return type(condition)(tuple(name_rows(lines, arg, names) for arg in condition.args))
    e = condition.value
    row = sympy.Add(*(t for t in sympy.Add.make_args(e) if not t.has(K)))
    if not row.has(P) or not row.has(sympy.Mod, sympy.floor):
        return condition
    sign = -1 if row.could_extract_minus_sign() else 1
    symbol = sympy.Symbol(f"row_value_{len(names)}", integer=True)
    names[symbol] = lines.set(f"row{len(lines.text)}", write_integer(sign * row))
    return Ge(e - row + sign * symbol)
