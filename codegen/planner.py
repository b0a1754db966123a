"""From a mask to a plan: the compiler's passes, in order.

    simplify_mask -> find_pieces -> bound_tiles -> write_test -> write_dead_tile_test -> order_tiles
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from maskdsl.codegen.bounds import bound_pieces
from maskdsl.codegen.lists import asks_head, base_of, bound_lists, sort_atoms
from maskdsl.codegen.plan import Plan, Sieve
from maskdsl.codegen.sieve import write_sieve
from maskdsl.codegen.writer import leaves_of, write_mask
from maskdsl.dynamic import ListMask, slots_of
from maskdsl.expr import Mask
from maskdsl.settings import debug
from maskdsl.shape import Shape
from maskdsl.spans import spans
from maskdsl.tiles import count_rows

SAMPLE = Shape(8192, 8192)  # where the cost model looks; plans do not depend on the call's length
LONG = Shape(16384, 16384)  # where the width of a mask is taken
MIN_DEAD_SHARE = 0.1  # of the masked tiles a sieve must skip to be kept; chosen, not measured


@lru_cache(maxsize=256)
def make_plan(mask: Mask, block_m: int, block_n: int, multiple: int = 1,
              apart: bool = False) -> Plan:
    """The plan of a (simplified) mask for one tile size in tokens; pure, so cached.

    multiple  FULL segments are whole multiples of this many key tiles; such a plan has no sieve
    apart     what is over of them has masked segments of its own (not beside call-time data)
    """
    lists = sort_atoms(mask)
    base = base_of(mask) if lists.listed else mask
    pieces = spans(base)
    if lists.listed:
        bounds, lists = bound_lists(mask, block_n, multiple)
    else:
        bounds = bound_pieces(pieces, block_n, multiple=multiple, apart=apart)
    live = spans(mask)
    rows, tests, listed_tests = write_mask(live)
    only_adds = all(leaf.held for piece in live for leaf in leaves_of(piece.rest))
    plan = Plan(mask, block_m, block_n, pieces, tuple(bounds.lines.text), bounds.full,
                bounds.masked, rows, tests, listed_tests, only_adds, None, is_last_heaviest(mask),
                any(map(asks_head, (*pieces, *live))), lists,
                borders=bounds.borders)
    if not lists.listed and multiple == 1:  # a listed tile may lie where the static mask is dead
        plan = choose_sieve(plan, write_sieve(pieces, bounds.ranges))
    debug(3, f"plan of {mask!r}: {len(pieces)} pieces, {len(plan.full)} full and "
             f"{len(plan.masked)} masked segments, {'a' if plan.sieve else 'no'} sieve")
    return plan


@lru_cache(maxsize=64)
def make_sifted(mask: Mask, block_m: int, block_n: int, multiple: int) -> Plan:
    """`make_plan` with the dead-tile test of its masked tiles, whether it pays or not."""
    plan = make_plan(mask, block_m, block_n, multiple)
    ranges = bound_pieces(plan.pieces, block_n, multiple=multiple).ranges
    return replace(plan, sieve=write_sieve(plan.pieces, ranges))


def choose_sieve(plan: Plan, sieve: Sieve | None) -> Plan:
    """Keep the dead-tile test where it skips enough of a sample call to pay for itself."""
    if sieve is None:
        return plan
    sifted = replace(plan, sieve=sieve)
    before, after = plan.count_tiles(SAMPLE)[1], sifted.count_tiles(SAMPLE)[1]
    debug(2, f"sieve of {plan.mask!r}: {before} masked tiles --> {after}")
    return sifted if after < before * (1 - MIN_DEAD_SHARE) else plan


def is_last_heaviest(mask: Mask) -> bool:
    """Whether the last query rows see as many keys as the first: then they should start first."""
    if any(isinstance(atom, ListMask) for atom in slots_of(mask)):
        return True  # causal lists grow with the row
    rows = np.array([0, SAMPLE.q_len - 1], dtype=np.int64)
    first, last = count_rows(mask, rows, SAMPLE)
    return bool(last >= first)


@lru_cache(maxsize=256)
def mean_row_width(mask: Mask, samples: int = 64) -> float:
    """Live keys per row, averaged over evenly spaced rows of a long call; lists count as empty."""
    rows = np.linspace(0, LONG.q_len - 1, samples).astype(np.int64)
    return float(count_rows(base_of(mask), rows, LONG).mean())
