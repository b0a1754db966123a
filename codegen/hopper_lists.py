"""Call-time data for the Hopper kernel: sets, lists and copies, made on the GPU, no host sync.

On top of what the portable kernel's `Tables` make, there are the distances parted by warp groups,
the copies of loose columns, and the planner's numbers for every item.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import triton

from maskdsl.codegen import hopper_list_kernels as kernels
from maskdsl.codegen.build import load_module
from maskdsl.codegen.emit import emit_lister
from maskdsl.codegen.emit_hopper_listed import fits_listed_letter
from maskdsl.codegen.emit_hopper_lists import (
    emit_planner,
    has_sides,
    kernel_parameters,
    planner_parameters,
    row_size,
)
from maskdsl.codegen.hopper_cut import GRAIN, ROWS, TILE, HopperConfig, Schedule, width_of
from maskdsl.codegen.lists import parameters
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.planner import make_plan
from maskdsl.codegen.tables import CHUNK, CallPlan, Tables, head_table, list_members, rank
from maskdsl.expr import Mask
from maskdsl.shape import Shape

Tensor = torch.Tensor
FIRST_TILE = 64  # keys of an item's first tile; chosen, not measured


@lru_cache(maxsize=256)
def refuse_listed(mask: Mask) -> str:
    """Why the Hopper kernel does not take a mask with call-time data; "" where it does."""
    if not all(fits_listed_letter(make_plan(mask, ROWS // n, GRAIN, TILE)) for n in (1, 4)):
        return "the mask has too many separate intervals beside its lists"
    return ""


def heads_told_apart(plan: Plan, data: Mapping[str, Any], heads: int) -> int:
    """How many kinds of query heads a call has: heads of one kind see the same keys."""
    text = " ".join((*plan.bounds, *plan.rows, *plan.tests))
    if re.search(r"\bhead\b", text):
        return heads
    return max(int(data[atom.slot].lead[1]) for atom in plan.lists.atoms)


@lru_cache(maxsize=256)
def pick_listed(mask: Mask, group: int, share: int, head_dim: int) -> HopperConfig:
    """The config for a mask with call-time data.

    group  query heads of a key/value head; share: neighbouring heads that see the same keys
    """
    packed = next(n for n in (4, 2, 1) if group % n == 0 and share % n == 0)
    if width_of(head_dim) < 128:
        return HopperConfig(packed, FIRST_TILE, 3, 3)
    # tiles of one warp group come in pairs: the values of either wait for the next pair's turn
    sides = has_sides(make_plan(mask, ROWS // packed, GRAIN, TILE))
    return HopperConfig(packed, FIRST_TILE, *((2, 3) if sides else (3, 2)))


def schedule_listed(config: HopperConfig, shape: Shape, groups: int, per_kv_head: int) -> Schedule:
    """All items whole, one key/value head after the other, so that its keys stay in the L2 cache
    while all query tiles pick from them."""
    q_tiles = -(-shape.q_len // config.span)
    return Schedule(q_tiles * groups, q_tiles, per_kv_head, 0, 0, 1)


class HopperTables(Tables):
    """The arguments that carry call-time data, as the Hopper kernel reads them."""

    def __init__(self, call: CallPlan, data: dict[str, Any], parted: bool) -> None:
        """parted: whether distances are parted by the warp groups that see them."""
        self.parted = parted
        super().__init__(call, data)

    def _add_list(self, name: str, marks: Tensor, capacity: int, shift: int) -> None:
        if name != "slash" or not self.parted:
            super()._add_list(name, marks, capacity, shift)
            return
        parts = self._part(marks)
        before, _ = rank(parts)
        members = list_members(parts, before, capacity, shift)
        if "union_slash_covered" in self.arguments:
            self.arguments["union_slash_covered"] = self._cover(parts, before)
        self.arguments |= {"union_slash_list": members, "union_slash_marks": parts,
                           "union_slash_before": before,
                           "union_slash_capacity": members.shape[-1],
                           "union_slash_words": parts.shape[-1]}
        self._lead("union_slash", (marks.shape[0], marks.shape[1]))

    def _part(self, marks: Tensor) -> Tensor:
        """int32 [B, H, 3, words]: distances both warp groups see, or one of them."""
        slashes = self._unite(self.slashes)
        before, _ = rank(slashes)
        parts = torch.empty(*marks.shape[:2], 3, marks.shape[2], dtype=torch.int32,
                            device=marks.device)
        lists, words = marks.shape[0] * marks.shape[1], marks.shape[2]
        kernels.part_sides[(lists, triton.cdiv(words, 64))](
            slashes, before, marks, parts, slashes.shape[-1], words, self.call.tile[0] // 2,
            self.call.tile[1], 64)
        return parts

    def _cover(self, parts: Tensor, before: Tensor) -> Tensor:
        """int32 [B, H, words]: bit o + BLOCK_M + BLOCK_N for every distance o in a grain that both
        warp groups see. Columns in other grains are left to the loop over columns."""
        covered = torch.empty_like(parts[:, :, 0])
        lists, words = covered.shape[0] * covered.shape[1], covered.shape[2]
        kernels.spread_bits[(lists, triton.cdiv(words, 64))](
            parts, before, covered, 3 * words, words, 2, self.call.tile[1], 64)
        return covered


def copy_columns(tables: HopperTables, source: Tensor) -> Tensor:
    """The rows of k or v [B, Hkv, L, D] that the lists of columns name, [B, H, capacity, D]."""
    members, before = (tables.arguments[f"union_column_{n}"] for n in ("list", "before"))
    batch, kv_heads, _, dim = source.shape
    heads = tables.call.heads // tables.arguments["union_copy_share"]
    capacity = members.shape[-1]
    row = -(-dim // 8) * 8  # rows of whole 16 bytes, which TMA asks for
    out = torch.empty(batch, heads, capacity, row, dtype=source.dtype, device=source.device)
    kernels.copy_columns[(batch * heads, triton.cdiv(capacity, 32))](
        source, members, before, out, source.stride(0), source.stride(1), source.stride(2), heads,
        kv_heads, members.shape[0], members.shape[1], capacity, before.shape[-1], DIM=dim,
        WIDTH=triton.next_power_of_2(dim), BLOCK=32, ROW=row)
    return out[..., :dim]


class ListedKernels:
    """The small kernels of one plan: the lister of its tables, and the planner."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.planner = load_module(emit_planner(plan)).plan_items
        self.lister = load_module(emit_lister(plan)).list_tiles if plan.lists.tables else None

    def prepare(self, shape: Shape, batch: int, heads: int, kv_heads: int, data: dict[str, Any],
                device: torch.device) -> HopperTables:
        """Everything the attention kernel reads besides q, k and v, launched in order."""
        lists, span = self.plan.lists, self.plan.block_m
        tables = HopperTables(CallPlan(lists, shape, batch, heads, (span, GRAIN), lists.by_head),
                              data, has_sides(self.plan))
        if self.lister is not None:
            tables.room_for_tiles()
            self._list_tiles(tables, device)
        kinds = heads_told_apart(self.plan, data, heads)
        items = batch * kinds * -(-shape.q_len // span)
        tables.arguments |= {
            "union_plan": torch.empty(items, row_size(self.plan), dtype=torch.int32,
                                      device=device),
            "union_plan_rows": items, "union_plan_batch": kinds, "union_plan_share": heads // kinds,
            "union_copy_share": heads // max(kv_heads, *(
                data[atom.slot].lead[1] for atom in lists.atoms))}
        self.planner[(items,)](
            kinds, heads // kinds, shape.q_len, shape.kv_len, shape.q_offset, shape.total_len,
            *(tables.arguments[p.name] for p in planner_parameters(self.plan)),
            BLOCK_M=span, BLOCK_N=GRAIN, num_warps=1)
        return tables

    def _list_tiles(self, tables: HopperTables, device: torch.device) -> None:
        """Run the lister for all query tiles."""
        call, arguments = tables.call, tables.arguments
        shape, span = call.shape, self.plan.block_m
        heads = tuple(range(0, call.heads, arguments["union_tile_share"]))
        tiles = -(-shape.q_len // span) * len(heads) * arguments["union_tile_list"].shape[0]
        names = [p.name for p in parameters(self.plan.lists)
                 if p.name.startswith(("slot_", "union_tile_"))]
        assert self.lister is not None
        self.lister[(tiles,)](
            head_table(heads, device), len(heads), shape.q_len, shape.kv_len, shape.q_offset,
            shape.total_len, *(arguments[name] for name in names),
            BLOCK_M=span, BLOCK_N=GRAIN, CHUNK=CHUNK)

    def arguments(self, tables: HopperTables) -> list[Any]:
        """The attention kernel's arguments beyond those of a static mask, in order."""
        return [tables.arguments[p.name] for p in kernel_parameters(self.plan)]
