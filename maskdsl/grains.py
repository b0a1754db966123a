"""Where a mask's formulas jump: the multiples at which its floors and remainders change.

RandomBlocks(64, 3) asks a formula of p // 64: bounds over a box that crosses a multiple of 64 say
nothing, and over boxes between such multiples they decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import sympy

from maskdsl.expr import Mask
from maskdsl.raster import Bools, Ints, trace_or_none
from maskdsl.trace import Ge, K, P, all_leaves

MOST_GRAINS = 2  # sizes a box is split by, the largest ones
Grain = tuple[int, int]  # (size, shift): jumps where place + shift is a multiple of size
Grains = tuple[Grain, ...]


@lru_cache(maxsize=256)
def grains_of(mask: Mask) -> tuple[Grains, Grains]:
    """(of query positions, of keys): the steps of the mask's formulas, in tokens."""
    found: tuple[set[Grain], set[Grain]] = (set(), set())
    for node in mask.walk():
        condition = None if node.below() else trace_or_none(node)
        for leaf in all_leaves(condition) if condition is not None else ():
            for size, over in steps_of(leaf.value) if isinstance(leaf, Ge) else ():
                for places, symbol in zip(found, (P, K), strict=True):
                    shift = sympy.expand(over - symbol)
                    if shift.is_Integer:
                        places.add((size, int(shift) % size))
    rows, keys = (tuple(sorted(places, reverse=True)[:MOST_GRAINS]) for places in found)
    return rows, keys


def steps_of(value: sympy.Expr) -> Iterator[tuple[int, sympy.Expr]]:
    """(size, what is divided by it) of every floor of an expression.

    p - 64*floor((p + 1)/64)  -->  (64, p + 1)
    """
    for node in sympy.preorder_traversal(value):
        if node.func == sympy.floor:
            over, under = sympy.fraction(sympy.together(node.args[0]))
            if under.is_Integer and under > 1:
                yield int(under), over


def split_range(low: Ints, high: Ints, grains: Grains, parts: int) -> tuple[Ints, Ints, Bools]:
    """Ranges [low, high] in at most `parts` pieces a grain, which no grain crosses.

    Returns first and last place, int64[n, pieces], some of which may repeat, and bool[n]: whether
    the pieces are not more than that; where False they are the whole range.
    """
    firsts, fits = [low[:, None]], np.ones(len(low), dtype=bool)
    for size, shift in grains:
        start = (low + shift) // size
        fits &= (high + shift) // size - start < parts
        marks = (start[:, None] + np.arange(parts)) * size - shift
        firsts.append(np.where((marks > low[:, None]) & (marks <= high[:, None]), marks,
                               low[:, None]))
    first = np.sort(np.concatenate(firsts, axis=1), axis=1)
    first = np.where(fits[:, None], first, low[:, None])
    most = 1 + int((np.diff(first, axis=1) > 0).sum(1).max(initial=0))
    first = first[:, -most:]  # what repeats is the first place
    last = np.concatenate([first[:, 1:] - 1, high[:, None]], axis=1)
    return first, np.maximum(first, last), fits
