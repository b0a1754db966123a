"""The text of one tile's mask: per-row bounds, then one condition on `p` (a column), `k` (a row).

Row bounds are [BLOCK_M, 1] and cost nothing in the loop; what remains for each pair is a compare
a bound. Prefixes share one bound: [0, a) | [0, b)  -->  k < max(a, b).
"""

from __future__ import annotations

import sympy

from maskdsl.codegen.bounds import Lines
from maskdsl.spans import ZERO, Piece
from maskdsl.text import write_condition, write_integer


def write_mask(pieces: tuple[Piece, ...]) -> tuple[tuple[str, ...], str]:
    """Pieces -> (row bound lines, live condition); the condition is bool[BLOCK_M, BLOCK_N]."""
    lines = Lines()
    prefixes = [p for p in pieces if p.lo == (ZERO,) and p.is_exact]
    tests = [f"(k < {_prefix_bound(lines, prefixes)})"] if prefixes else []
    for i, piece in enumerate(p for p in pieces if p not in prefixes):
        tests.append(_interval_test(lines, i, piece))
    return tuple(lines.text), " | ".join(tests) if tests else "k < 0"


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


def _interval_test(lines: Lines, i: int, piece: Piece) -> str:
    hi = lines.set(f"upper{i}", _upper(piece))
    tests = [f"(k < {hi})"]
    if piece.lo != (ZERO,):
        lo = lines.set(f"lower{i}", write_integer(sympy.Max(*piece.lo)))
        tests.insert(0, f"(k >= {lo})")
    if not piece.is_exact:
        tests.append(f"({write_condition(piece.rest)})")
    return f"({' & '.join(tests)})"


