"""What the Hopper kernel does in a call: its items, their first tiles, masked and FULL tiles.

Counted with the functions that cut a call when it is launched (`hopper_cut`), on the host.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from maskdsl.codegen.emit_hopper import INTERVAL
from maskdsl.codegen.hopper_cut import (
    ELEMENT,
    HopperConfig,
    Schedule,
    count_tiles,
    kinds_of,
    make_plans,
    pick_hopper,
    pick_section,
    schedule,
)
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.row_classes import classify_rows
from maskdsl.codegen.visits import Visited
from maskdsl.codegen.workload import CallHeads, KindWork, count_entries, live_pairs
from maskdsl.expr import Mask
from maskdsl.shape import Shape
from maskdsl.tiles import Ints


def item_of(mask: Mask, call: CallHeads) -> tuple[int, int]:
    """(rows of an item, which are heads x positions, keys of a tile)."""
    config = pick_hopper(mask, call.heads // call.kv_heads, call.head_dim, call.value_dim)
    return config.rows, config.block_n


@dataclass(frozen=True, slots=True)
class HopperCut:
    """How the kernel cuts one call.

    config      heads packed into an item, keys of its first tile
    schedule    items in all, query tiles whose keys are cut into ranges
    processors  multiprocessors it was cut for: an item too long for its share of one is cut
    """

    config: HopperConfig
    schedule: Schedule
    processors: int

    @property
    def cut_rows(self) -> tuple[int, int]:
        """Query rows [first, stop) whose keys are cut into ranges, not clipped to the call."""
        span, cut = self.config.span, self.schedule
        return cut.split_first * span, (cut.split_first + cut.split_count) * span

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return {"heads_packed": self.config.heads_packed, "span": self.config.span,
                "first_tile_keys": self.config.narrow, "processors": self.processors,
                **asdict(self.schedule)}


def count_hopper(mask: Mask, shape: Shape, call: CallHeads, processors: int,
                 with_pairs: bool = True) -> tuple[tuple[KindWork, ...], HopperCut]:
    """The work of every kind of head, costliest first, in a call whose (simplified) mask the kernel
    takes (`refuse_mask`).

    with_pairs  whether live pairs and classes of rows are wanted too
    """
    group = call.heads // call.kv_heads
    config = pick_hopper(mask, group, call.head_dim, call.value_dim)
    kinds = kinds_of(mask)
    plans = make_plans(mask, config.span, config.tile)
    groups = call.batch * call.heads // config.heads_packed
    section = pick_section(kinds[0][1], shape.kv_len,
                           ELEMENT * (call.head_dim + call.value_dim), groups,
                           group // config.heads_packed)
    cut = schedule(plans[0], config, shape, groups, section, processors, len(kinds)) \
        if shape.q_len else Schedule(0, 0, section, 0, 0, 1)
    found = HopperCut(config, cut, processors)
    return tuple(count_kind(one, plan, heads, shape, call, found, with_pairs)
                 for (heads, one), plan in zip(kinds, plans, strict=True)), found


def count_kind(mask: Mask, plan: Plan, heads: tuple[int, ...], shape: Shape, call: CallHeads,
               found: HopperCut, with_pairs: bool) -> KindWork:
    """The work of the heads `heads` (() for all), which share a mask."""
    config, cut = found.config, found.schedule
    mine = heads or tuple(range(call.heads))
    visited, live = Visited(), 0 if with_pairs else None
    for (batch, head), times in who_differs(mask, plan, mine, call).items():
        masked, full = count_tiles(plan, config, shape, batch, head)
        visited = visited.plus(visit(masked, full, config, cut), times // config.heads_packed)
        more = live_pairs(mask, shape, None, batch, head) if live is not None else None
        live = None if live is None or more is None else live + times * more
    masked, full = count_tiles(plan, config, shape)
    rows = classify_rows(plan, shape, {"full": full, "masked": masked}) if with_pairs else ()
    return KindWork(mask, len(mine), live, visited, plan, rows)


def who_differs(mask: Mask, plan: Plan, heads: tuple[int, ...],
                call: CallHeads) -> dict[tuple[int, int], int]:
    """(batch, head) of one of each set of heads with equal work, and how many it stands for: all,
    but where the mask asks for the head; then an item holds one head."""
    if not plan.needs_head:
        return {(0, heads[0]): call.batch * len(heads)}
    return count_entries(mask, heads, call, None)


def is_intervals(plan: Plan) -> bool:
    """Whether the kernel masks a tile by words of bits, as in all measured calls; else it tests
    pair by pair."""
    return all(INTERVAL.fullmatch(test) for test in plan.tests)


def visit(masked: Ints, full: Ints, config: HopperConfig, cut: Schedule) -> Visited:
    """The steps of one group of heads.

    masked, full  tiles of every query tile after the first, int64[query tiles]
    """
    if not masked.size:
        return Visited()
    ranges = np.ones(len(masked), dtype=np.int64)  # items of every query tile
    ranges[cut.split_first:cut.split_first + cut.split_count] = cut.splits
    items = int(ranges.sum())
    return Visited(items=items, full=int(full.sum()), masked=int(masked.sum()),
                   longest=int((-(-(masked + full) // ranges)).max()),
                   first=items * config.narrow)
