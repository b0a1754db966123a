"""From a mask to a plan: the compiler's passes, in order.

    simplify_mask -> find_pieces -> bound_tiles -> write_test -> write_dead_tile_test -> order_tiles
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from maskdsl.codegen.bounds import bound_pieces
from maskdsl.codegen.plan import Plan, Sieve
from maskdsl.codegen.sieve import write_sieve
from maskdsl.codegen.writer import write_mask
from maskdsl.expr import Mask
from maskdsl.settings import debug
from maskdsl.shape import Shape
from maskdsl.spans import Piece, spans
from maskdsl.tiles import count_rows
from maskdsl.trace import BATCH, HEAD, Condition, Ge

SAMPLE = Shape(8192, 8192)  # where the cost model looks; plans do not depend on the call's length
LONG = Shape(16384, 16384)  # where the width of a mask is taken
MIN_DEAD_SHARE = 0.1  # of the masked tiles a sieve must skip to be kept; chosen, not measured


@lru_cache(maxsize=256)
def make_plan(mask: Mask, block_m: int, block_n: int) -> Plan:
    """The plan of a (simplified) mask for one tile size in tokens; pure, so cached."""
    pieces = spans(mask)
    lines, ranges, full, masked = bound_pieces(pieces, block_n)
    rows, tests = write_mask(pieces)
    plan = Plan(mask, block_m, block_n, pieces, tuple(lines.text), full, masked, rows, tests,
                None, is_last_heaviest(mask), any(map(asks_head, pieces)))
    plan = choose_sieve(plan, write_sieve(pieces, ranges))
    debug(3, f"plan of {mask!r}: {len(pieces)} pieces, {len(full)} full and {len(masked)} masked "
             f"segments, {'a' if plan.sieve else 'no'} sieve")
    return plan


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
    rows = np.array([0, SAMPLE.q_len - 1], dtype=np.int64)
    first, last = count_rows(mask, rows, SAMPLE)
    return bool(last >= first)


def mean_row_width(mask: Mask, samples: int = 64) -> float:
    """Live keys per row, averaged over evenly spaced rows of a long call."""
    rows = np.linspace(0, LONG.q_len - 1, samples).astype(np.int64)
    return float(count_rows(mask, rows, LONG).mean())


def asks_head(piece: Piece) -> bool:
    """Whether the piece differs between batches or heads."""
    bounds = piece.lo + piece.hi + piece.first + piece.last
    return any(t.has(BATCH, HEAD) for t in bounds) or _condition_asks_head(piece.rest)


def _condition_asks_head(condition: Condition) -> bool:
    if isinstance(condition, Ge):
        return bool(condition.value.has(BATCH, HEAD))
    return any(map(_condition_asks_head, condition.args))
