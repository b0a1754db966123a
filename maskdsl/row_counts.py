"""Live keys of rows where conditions are tested: rows that the conditions cannot tell apart are
counted together, with one sum along the keys for all of them.

`k % 64 == 0` sees nothing of p, `(p - k) % 64 == 0` only p % 64, `k // 64 == f(p // 64)` only
p // 64. So a periodic mask of a million tokens is counted exactly with 64 sums, not 10^12 tests.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from math import lcm
from types import CodeType
from typing import Any

import numpy as np
import numpy.typing as npt
import sympy

from maskdsl.spans import Piece
from maskdsl.text import NUMPY_NAMES, write_condition
from maskdsl.trace import Has, K, P, all_leaves

MOST_TESTS = 1 << 27  # pairs tested in all
Ints = npt.NDArray[np.int64]


def class_rows(pieces: Iterable[Piece], p: Ints) -> Ints | None:
    """For every row a number that is the same where no condition can tell rows apart; None where a
    condition asks for p itself, or for a list of the call."""
    period = 1
    steps: set[tuple[int, int]] = set()
    for piece in pieces:
        if piece.is_exact:
            continue
        for leaf in all_leaves(piece.rest):
            found = None if isinstance(leaf, Has) else read_steps(leaf.value)
            if found is None:
                return None
            period = lcm(period, found[0])
            steps |= found[1]
    keys = np.stack([p % period, *((p + shift) // size for size, shift in sorted(steps))])
    inverse: Ints = np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1)
    return inverse


def read_steps(value: sympy.Expr) -> tuple[int, set[tuple[int, int]]] | None:
    """(period, {(size, shift)}): all that the expression sees of p is p % period and
    (p + shift) // size. None where it sees more."""
    period, rest = 1, value
    steps: set[tuple[int, int]] = set()
    for node in sympy.preorder_traversal(value):
        if node.func == sympy.Mod and node.has(P):
            over, under = node.args
            slope = sympy.expand(over).coeff(P, 1)
            if not under.is_Integer or not slope.is_Integer or \
                    sympy.expand(over - slope * P).has(P):
                continue
            period = lcm(period, int(under))
            rest = rest.xreplace({node: sympy.Integer(0)})
        elif node.func == sympy.floor and node.has(P) and not node.has(K):
            over, under = sympy.fraction(sympy.together(node.args[0]))
            shift = sympy.expand(over - P)
            if under.is_Integer and shift.is_Integer:
                steps.add((int(under), int(shift)))
                rest = rest.xreplace({node: sympy.Integer(0)})
    return None if rest.has(P) else (period, steps)


def count_by_classes(pieces: tuple[Piece, ...], bounds: list[tuple[Ints, Ints]], p: Ints,
                     kv_len: int, names: dict[str, Any]) -> Ints | None:
    """Live keys of every row, int64[len(p)]; None where that takes too many tests.

    bounds  [lo, hi) of every piece, int64[len(p)] each, as `row_intervals` gives them
    """
    classes = class_rows(pieces, p)
    if classes is None or not is_few(classes, kv_len):
        return None
    counts = np.zeros(len(p), dtype=np.int64)
    lo, hi = (np.stack([pair[i] for pair in bounds]) for i in (0, 1))
    tests = [compile(write_condition(piece.rest), "<condition>", "eval") if not piece.is_exact
             else None for piece in pieces]
    values = NUMPY_NAMES | names | {"k": np.arange(kv_len, dtype=np.int64)}
    order = np.argsort(classes, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(classes[order])) + 1):
        if rows.size:
            sums = Sums(tests, values | {"p": int(p[rows[0]])})
            counts[rows] = sums.count(lo[:, rows], hi[:, rows])
    return counts


def is_countable(pieces: tuple[Piece, ...], p: Ints, kv_len: int) -> bool:
    """Whether `count_by_classes` counts these rows."""
    classes = class_rows(pieces, p)
    return classes is not None and is_few(classes, kv_len)


def is_few(classes: Ints, kv_len: int) -> bool:
    """Whether so many classes of rows can be tested at all keys."""
    return (int(classes.max(initial=-1)) + 1) * kv_len <= MOST_TESTS


class Sums:
    """The conditions of some pieces for one class of rows, summed along the keys.

    tests   the condition of each piece, compiled; None where its interval decides
    values  what they refer to, for one row of the class
    """

    def __init__(self, tests: list[CodeType | None], values: dict[str, Any]) -> None:
        self.tests, self.values = tests, values
        self.exact = np.array([test is None for test in tests])
        self.known: dict[int, Ints] = {}

    def below(self, active: int) -> Ints:
        """How many keys below each place a piece of the bits `active` keeps, int64[keys + 1]."""
        if active not in self.known:
            live = np.zeros(len(self.values["k"]), dtype=bool)
            for i, test in enumerate(self.tests):
                if active >> i & 1 and test is not None:
                    live |= np.asarray(eval(test, self.values), dtype=bool)
            self.known[active] = np.concatenate([[0], np.cumsum(live, dtype=np.int64)])
        return self.known[active]

    def count(self, lo: Ints, hi: Ints) -> Ints:
        """Live keys of rows with the intervals [lo, hi), int64[pieces, rows]."""
        edges = np.sort(np.concatenate([lo, hi]), axis=0)
        bits = 1 << np.arange(len(self.tests), dtype=np.int64)
        total = np.zeros(lo.shape[1], dtype=np.int64)
        for a, b in pairwise(edges):
            inside = (lo <= a) & (hi >= b) & (a < b)
            whole = inside[self.exact].any(0)
            total += np.where(whole, b - a, 0)
            active = np.where(whole, 0, (inside * bits[:, None]).sum(0))
            for code in np.unique(active[active > 0]).tolist():
                here = active == code
                sums = self.below(code)
                total[here] += sums[b[here]] - sums[a[here]]
        return total
