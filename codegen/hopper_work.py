"""What the Hopper kernel does in a call: its items, their first tiles, masked and FULL tiles.

Counted with the functions that cut a call when it is launched (`hopper_cut`), on the host.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from maskdsl.codegen.emit_hopper import INTERVAL
from maskdsl.codegen.hopper_cut import (
    BLOCK_N,
    GRAIN,
    ROWS,
    TILE,
    HopperConfig,
    Schedule,
    count_tiles,
    pick_hopper,
    pick_section,
    schedule,
)
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.planner import make_plan
from maskdsl.codegen.row_classes import classify_rows
from maskdsl.codegen.visits import Visited
from maskdsl.codegen.workload import CallHeads, KindWork, count_entries, live_pairs
from maskdsl.expr import Mask
from maskdsl.shape import Shape
from maskdsl.tiles import Ints

ITEM = (ROWS, BLOCK_N)  # rows of an item, which are heads x positions, and keys of a tile
ELEMENT = 2  # bytes: the kernel takes 16-bit inputs


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
                 with_pairs: bool = True) -> tuple[KindWork, HopperCut]:
    """The work of a call whose (simplified) mask the kernel takes (`refuse_mask`).

    with_pairs  whether live pairs and classes of rows are wanted too
    """
    group = call.heads // call.kv_heads
    config = pick_hopper(mask, group, call.head_dim)
    plan = make_plan(mask, config.span, GRAIN, TILE)
    groups = call.batch * call.heads // config.heads_packed
    section = pick_section(mask, shape.kv_len, ELEMENT * (call.head_dim + call.value_dim), groups,
                           group // config.heads_packed)
    cut = schedule(plan, config, shape, groups, section, processors) if shape.q_len else \
        Schedule(0, 0, section, 0, 0, 1)
    visited, live = Visited(), 0 if with_pairs else None
    for (batch, head), heads in who_differs(mask, plan, call).items():
        masked, full = count_tiles(plan, config, shape, batch, head)
        visited = visited.plus(visit(masked, full, config, cut), heads // config.heads_packed)
        more = live_pairs(mask, shape, None, batch, head) if live is not None else None
        live = None if live is None or more is None else live + heads * more
    masked, full = count_tiles(plan, config, shape)
    rows = classify_rows(plan, shape, {"full": full, "masked": masked}) if with_pairs else ()
    return KindWork(mask, call.heads, live, visited, plan, rows), HopperCut(config, cut, processors)


def who_differs(mask: Mask, plan: Plan, call: CallHeads) -> dict[tuple[int, int], int]:
    """(batch, head) of one of each set of heads with equal work, and how many it stands for: all,
    but where the mask asks for the head; then an item holds one head."""
    if not plan.needs_head:
        return {(0, 0): call.batch * call.heads}
    return count_entries(mask, tuple(range(call.heads)), call, None)


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
