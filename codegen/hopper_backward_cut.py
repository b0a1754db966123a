"""Which calls the Hopper backward takes, and how it cuts them: all on the host, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from maskdsl.codegen.emit_hopper_backward import (
    emit_key_side,
    emit_query_side,
    fits_letter,
    places_by_key,
    places_by_query,
)
from maskdsl.codegen.hopper_cut import (
    GRAIN,
    LEAST_SHARE,
    ROWS,
    SHARE,
    Schedule,
    pick_section,
)
from maskdsl.codegen.long_items import cut_long
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.planner import SAMPLE, make_plan
from maskdsl.codegen.row_bounds import KeyPlan, make_key_plan
from maskdsl.dynamic import slots_of
from maskdsl.expr import Mask
from maskdsl.heads import count_heads
from maskdsl.shape import Shape

PASS_ROWS = 64  # rows of a step
HEAVY = 1.5  # an item is cut only if it is that much longer than the median one; not measured
PART_BYTES = 64 << 20  # most that float32 parts of cut items may take, all own heads together


@lru_cache(maxsize=256)
def refuse_mask(mask: Mask) -> str:
    """Why the Hopper backward does not take a (simplified) mask; "" where it does."""
    if count_heads(mask):
        return "the mask differs by kind of head"
    if slots_of(mask):
        return "the mask reads data that comes with the call"
    plan = make_plan(mask, 64, 64)
    if plan.needs_head:
        return "the mask asks for the head"
    if plan.sieve is not None:
        return "the mask has dead tiles inside its intervals, which only the portable kernel skips"
    if not (fits_letter(places_by_query(QuerySide(mask, 1).plan))
            and fits_letter(places_by_key(KeySide(mask, 1).by_key))):
        return "the mask has too many separate intervals"
    return ""


def refuse_dims(head_dim: int, value_dim: int) -> str:
    """Why the Hopper backward does not take head dimensions; "" where it does."""
    if head_dim != value_dim or head_dim not in (64, 128):
        return (f"head dimensions {head_dim} and {value_dim}: the Hopper backward takes 64 and 64, "
                "or 128 and 128")
    return ""


@dataclass(frozen=True)
class QuerySide:
    """dQ: queries own the rows of an item, up to 4 heads x `span` positions; keys pass.

    share  query heads of a key/value head
    """

    mask: Mask
    share: int

    @property
    def own_heads(self) -> int:
        """Query heads of an item, which share its key tiles."""
        return next(n for n in (4, 2, 1) if self.share % n == 0)

    @cached_property
    def constants(self) -> dict[str, Any]:
        """The constexpr arguments of the kernel that the mask and the heads decide."""
        return {"BY_KEY": False, "OWN_HEADS": self.own_heads, "OWN_SPAN": ROWS // self.own_heads,
                "PASS_HEADS": 1, "TILE": PASS_ROWS // GRAIN, "GRAIN": GRAIN}

    @cached_property
    def plan(self) -> Plan:
        """The plan by query in grains."""
        return make_plan(self.mask, ROWS // self.own_heads, GRAIN, PASS_ROWS // GRAIN)

    @property
    def source(self) -> str:
        """The kernel file."""
        return emit_query_side(self.plan)

    @property
    def members(self) -> int:
        """Groups of passing heads an item meets one after the other."""
        return 1

    def own_length(self, shape: Shape) -> int:
        """Rows of the side that owns."""
        return shape.q_len

    def count_steps(self, shape: Shape) -> Any:
        """(masked, FULL) steps of every own tile, int64[own tiles]."""
        plan = self.plan
        return count_places(plan, plan.run_bounds(shape), "p_first", PASS_ROWS // GRAIN)


@dataclass(frozen=True)
class KeySide:
    """dK and dV: 128 keys of one key/value head own the rows of an item, queries pass: `span`
    positions of up to 2 heads a step.

    share  query heads of a key/value head
    """

    mask: Mask
    share: int

    @property
    def pass_heads(self) -> int:
        """Query heads of a step."""
        return 2 if self.share % 2 == 0 else 1

    @cached_property
    def constants(self) -> dict[str, Any]:
        """The constexpr arguments of the kernel that the mask and the heads decide."""
        return {"BY_KEY": True, "OWN_HEADS": 1, "OWN_SPAN": ROWS, "PASS_HEADS": self.pass_heads,
                "TILE": 1, "GRAIN": PASS_ROWS // self.pass_heads}

    @property
    def by_key(self) -> KeyPlan:
        """The plan by key."""
        return plan_by_key(self.mask, PASS_ROWS // self.pass_heads)

    @cached_property
    def last_first(self) -> bool:
        """Whether the last keys of a long call are seen by more rows than the first: they should
        start first then."""
        masked, full = self.count_steps(SAMPLE)
        steps = masked + full
        half = len(steps) // 2
        return bool(steps[:half].sum() < steps[half:].sum())

    @property
    def source(self) -> str:
        """The kernel file."""
        return emit_key_side(self.by_key, self.last_first)

    @property
    def members(self) -> int:
        """Groups of passing heads an item meets one after the other."""
        return self.share // self.pass_heads

    def own_length(self, shape: Shape) -> int:
        """Rows of the side that owns."""
        return shape.kv_len

    def count_steps(self, shape: Shape) -> Any:
        """(masked, FULL) steps of every own tile and passing group of heads, int64[own tiles]."""
        by_key = self.by_key
        return count_places(by_key, by_key.run_bounds(shape), "k_first", 1)


Side = QuerySide | KeySide


@lru_cache(maxsize=256)
def plan_by_key(mask: Mask, span: int) -> KeyPlan:
    """The plan of 128 keys and `span` positions; turning bounds round takes milliseconds."""
    return make_key_plan(make_plan(mask, span, ROWS, 1))


def count_places(plan: Plan | KeyPlan, values: dict[str, Any], own: str,
                 tile: int) -> tuple[Any, Any]:
    """(masked, FULL) steps; an own tile without either takes one masked step, all dead."""
    loose, full = count_tiles(plan, values, own)
    masked, full = -(-loose // tile), full // tile
    return np.where(masked + full == 0, 1, masked), full


def count_tiles(plan: Plan | KeyPlan, values: dict[str, Any], own: str) -> tuple[Any, Any]:
    """(loose, FULL) grains or tiles of every own tile."""
    like = np.zeros(len(values[own]), dtype=np.int64)
    loose, full = (sum((eval(s.stop, values) - eval(s.start, values) for s in which), like)
                   for which in (plan.masked, plan.full))
    return loose, full


def cut_call(side: Side, shape: Shape, groups: int, section: int, processors: int,
             row_bytes: int) -> Schedule:
    """Cut the few long items (a sink's keys are seen by every row, LastQ rows see every key), so
    that none is the tail.

    groups     groups of own heads, all batch entries together
    row_bytes  bytes of the float32 results of an own row of all its group's heads
    """
    tiles = -(-side.own_length(shape) // int(side.constants["OWN_SPAN"]))
    whole = Schedule(tiles * groups, tiles, section, 0, 0, 1)
    masked, full = side.count_steps(shape)
    steps = (masked + full) * side.members
    if not steps.size:
        return whole
    share = max(float(steps.sum()) * groups / processors * SHARE, LEAST_SHARE,
                HEAVY * float(np.median(steps)))
    first, count, splits = cut_long(steps, share, lambda long: min(
        int(long.min()), PART_BYTES // max(1, len(long) * groups * ROWS * row_bytes)))
    items = (tiles + count * (splits - 1)) * groups
    return Schedule(items, tiles, section, first, count, splits)


def section_of(side: Side, shape: Shape, dim: int, groups: int) -> int:
    """Groups of own heads that run side by side, so that what passes stays in the L2 cache."""
    if isinstance(side, QuerySide):
        return pick_section(side.mask, shape.kv_len, 2 * 2 * dim, groups,
                            side.share // side.own_heads)
    return pick_section(side.mask, shape.q_len, 2 * 2 * dim * side.pass_heads, groups, 1)
