"""Which calls the Hopper kernel takes, and how it cuts them: all on the host, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from maskdsl.codegen.emit_hopper import fits_letter
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.planner import LONG, make_plan, mean_row_width
from maskdsl.codegen.tune import DENSE_WIDTH
from maskdsl.dynamic import slots_of
from maskdsl.expr import Mask
from maskdsl.heads import count_heads
from maskdsl.shape import Shape

ROWS = 128  # of an item: two warp groups of 64
GRAIN, BLOCK_N = 32, 128  # keys of a grain (the bits of a word) and of a tile
TILE = BLOCK_N // GRAIN
L2_BYTES = 32 << 20  # keys and values of the heads that run side by side should fit the L2 cache
SHARE = 0.5  # an item longer than this part of one multiprocessor's work is cut along its keys
LEAST_SHARE = 16.0  # steps; joining the parts costs a launch
MAX_SPLITS = 64


@dataclass(frozen=True, slots=True)
class HopperConfig:
    """How the kernel is cut.

    heads_packed  query heads of an item; they share a key/value head and so its key tiles
    narrow        keys of an item's first tile; every other has BLOCK_N
    k_slots       tiles of keys in flight; v_slots: of values
    """

    heads_packed: int
    narrow: int
    k_slots: int
    v_slots: int
    registers: int = 232

    @property
    def span(self) -> int:
        """Positions of an item."""
        return ROWS // self.heads_packed


@lru_cache(maxsize=256)
def refuse_mask(mask: Mask, by_name: bool = False) -> str:
    """Why the Hopper kernel does not take a mask; "" where it does.

    by_name  whether the kernel was asked for by name: what has not run on a GPU yet is taken only
             then
    """
    if count_heads(mask):
        return "the mask differs by kind of head"
    if slots_of(mask):
        if by_name:
            from maskdsl.codegen.hopper_lists import refuse_listed

            return refuse_listed(mask)
        return ("the mask reads data that comes with the call "
                "(unmeasured; backend='hopper' takes it)")
    if make_plan(mask, 64, 64).sieve is not None:
        return "the mask has dead tiles inside its intervals, which only the portable kernel skips"
    if not fits_letter(make_plan(mask, ROWS // 4, GRAIN, TILE)):
        return "the mask has too many separate intervals"
    return ""


def refuse_dims(head_dim: int, value_dim: int) -> str:
    """Why the Hopper kernel does not take head dimensions; "" where it does."""
    if max(head_dim, value_dim) > 128:
        return f"head dimension {max(head_dim, value_dim)} is beyond 128"
    if width_of(value_dim) > width_of(head_dim):
        return "values are wider than queries"
    return ""


def width_of(dim: int) -> int:
    """Elements of a row in shared memory: whole swizzle lines of 128 bytes."""
    return 64 if dim <= 64 else 128


@lru_cache(maxsize=256)
def pick_hopper(mask: Mask, group: int, head_dim: int) -> HopperConfig:
    """The config for a mask, heads per key/value head and head dimension."""
    packed = 1
    if not make_plan(mask, ROWS, GRAIN).needs_head:
        packed = next(n for n in (4, 2, 1) if group % n == 0)
    slots = (3, 2) if width_of(head_dim) == 128 else (3, 3)
    plan = make_plan(mask, ROWS // packed, GRAIN, TILE)
    return HopperConfig(packed, pick_narrow(plan), *slots)


def pick_narrow(plan: Plan) -> int:
    """The width of the first tile that leaves the fewest empty columns in a long call."""
    loose, _ = count_grains(plan, LONG)

    def columns(narrow: int) -> float:
        rest = np.maximum(loose - narrow // GRAIN, 0)
        return float((narrow + BLOCK_N * -(-rest // TILE)).mean())

    return min((128, 64, 32), key=columns)


def count_grains(plan: Plan, shape: Shape, batch: int = 0, head: int = 0) -> tuple[Any, Any]:
    """(loose, full) grains of every query tile, int64[query tiles]."""
    values = plan.run_bounds(shape, batch, head)
    like = np.zeros(len(values["p_first"]), dtype=np.int64)
    loose, full = (sum((stop - start for start, stop in plan.segments(which, values)), like)
                   for which in (plan.masked, plan.full))
    return loose, full


def count_tiles(plan: Plan, config: HopperConfig, shape: Shape, batch: int = 0,
                head: int = 0) -> tuple[Any, Any]:
    """(masked, FULL) tiles of every query tile after its first tile, int64[query tiles].

    A query tile without either takes one masked tile, which then finds every pair dead.
    """
    loose, grains = count_grains(plan, shape, batch, head)
    masked = -(-np.maximum(loose - config.narrow // GRAIN, 0) // TILE)
    full = grains // TILE
    return np.where(masked + full == 0, 1, masked), full


def count_steps(plan: Plan, config: HopperConfig, shape: Shape) -> Any:
    """Steps of every query tile after its first tile, int64[query tiles]."""
    masked, full = count_tiles(plan, config, shape)
    return masked + full


@dataclass(frozen=True, slots=True)
class Schedule:
    """How the items of a call are ordered and cut.

    section                   groups of heads that run side by side
    split_first, split_count  query tiles whose keys are cut into `splits` ranges
    """

    items: int
    q_tiles: int
    section: int
    split_first: int
    split_count: int
    splits: int


def schedule(plan: Plan, config: HopperConfig, shape: Shape, groups: int, section: int,
             processors: int) -> Schedule:
    """Cut the few long items (LastQ rows see the whole prompt), so that none is the tail.

    groups  groups of heads, all batch entries together
    """
    q_tiles = -(-shape.q_len // config.span)
    whole = Schedule(q_tiles * groups, q_tiles, section, 0, 0, 1)
    if plan.needs_head:
        return whole
    steps = count_steps(plan, config, shape) + 1
    share = max(float(steps.sum()) * groups / processors * SHARE, LEAST_SHARE)
    heavy = np.flatnonzero(steps > share)
    if not heavy.size or heavy[-1] - heavy[0] + 1 != heavy.size:
        return whole
    splits = min(-(-int(steps[heavy].max()) // int(share)), MAX_SPLITS,
                 int(steps[heavy].min()) - 1)
    if splits < 2 or heavy.size > q_tiles // 2:
        return whole
    items = (q_tiles - heavy.size) * groups + int(heavy.size) * groups * splits
    return Schedule(items, q_tiles, section, int(heavy[0]), int(heavy.size), splits)


def pick_section(mask: Mask, kv_len: int, row_bytes: int, groups: int, per_kv_head: int) -> int:
    """Groups of heads that run side by side: of a nearly dense mask only as many as keep their
    keys and values in the L2 cache, else all (H100: +5 % dense, -6 to -15 % on triangles)."""
    if mean_row_width(mask) < DENSE_WIDTH:
        return groups
    heads = max(1, L2_BYTES // max(kv_len * row_bytes, 1))
    most = min(groups, heads * per_kv_head)
    return next(n for n in range(most, 0, -1) if groups % n == 0)
