"""Which tiles the portable gradients' kernels cut into parts: the few that take far more steps.

A sink's keys are seen by every row, and LastQ rows see every key: at 32K such a tile takes forty
times the steps of another, and one program would still run when all others are done. Counted on
the host, from the same bounds as in the kernels, without a GPU; call-time data is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from maskdsl.codegen.emit_backward import cuts_queries
from maskdsl.codegen.long_items import cut_long
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.row_bounds import KeyPlan
from maskdsl.dynamic import Document, Prefix, slots_of
from maskdsl.shape import Shape

# Not measured. Longest first, a tail is at most one item: an eighth of a multiprocessor's share.
SHARE = 0.125
LEAST_STEPS = 32.0  # fewer steps are not worth a part's way through memory
HEAVY = 1.5  # an item is cut only if it is that much longer than the median one
PART_BYTES = 64 << 20  # most that float32 parts may take


@dataclass(frozen=True, slots=True)
class Cut:
    """The tiles [first, first + count) as `parts` programs each; count 0 for none."""

    first: int = 0
    count: int = 0
    parts: int = 1

    @property
    def numbers(self) -> tuple[int, int, int]:
        """The arguments cut_first, cut_count, cut_parts."""
        return self.first, self.count, self.parts

    def programs(self, tiles: int) -> int:
        """Programs for all tiles of a head."""
        return tiles + self.count * (self.parts - 1)


def count_steps(plan: Plan | KeyPlan, shape: Shape) -> Any:
    """Steps of every tile of the side that owns, without those of lists; int64[tiles]."""
    values = plan.run_bounds(shape)
    like = np.zeros(len(values["p_first" if isinstance(plan, Plan) else "k_first"]), np.int64)
    return sum((np.maximum(eval(s.stop, values) - eval(s.start, values), 0)
                for s in (*plan.full, *plan.masked)), like)


def knows_steps(plan: Plan) -> bool:
    """Whether bounds can be told before a call: documents and prefixes come with it."""
    return not any(isinstance(atom, Document | Prefix) for atom in slots_of(plan.mask))


def cut_tiles(steps: Any, groups: int, processors: int, tile_bytes: int) -> Cut:
    """Cut the few long tiles.

    steps       of every tile, int64[tiles]
    groups      heads that each walk all tiles, all batch entries together
    tile_bytes  bytes of the float32 sums of one tile
    """
    if not steps.size:
        return Cut()
    share = max(float(steps.sum()) * groups / processors * SHARE, LEAST_STEPS,
                HEAVY * float(np.median(steps)))
    return Cut(*cut_long(steps, share, lambda long: PART_BYTES // (len(long) * groups
                                                                   * tile_bytes)))


def find_cuts(plans: tuple[Plan, ...], by_key: tuple[KeyPlan, ...], kinds: tuple[int, ...],
              call: tuple[Shape, int, int, int, int],
              row_bytes: tuple[int, int]) -> tuple[Cut, Cut]:
    """The query tiles and the key tiles of a call that are cut.

    kinds      heads of each kind; () for one kind
    call       shape, batch, query heads, key/value heads, multiprocessors
    row_bytes  bytes of the float32 sums of a query row and of a key
    """
    shape, batch, heads, kv_heads, processors = call
    if not all(map(knows_steps, plans)):
        return Cut(), Cut()
    queries = Cut()
    if cuts_queries(plans, kinds):
        queries = cut_tiles(count_steps(plans[0], shape), batch * heads, processors,
                            row_bytes[0] * plans[0].block_m)
    steps = reduce(np.maximum, (count_steps(one, shape) for one in by_key))
    return queries, cut_tiles(steps * (heads // kv_heads), batch * kv_heads, processors,
                              row_bytes[1] * by_key[0].plan.block_n)
