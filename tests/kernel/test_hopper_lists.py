"""The whole Hopper kernel of masks with call-time data, warp group by warp group, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gluon_threads import Descriptor, Pointer, run_forward

from maskdsl import (
    BlockIndices,
    Blocks,
    Causal,
    ColumnIndices,
    Columns,
    LastQ,
    Mask,
    Shape,
    Sink,
    VerticalSlash,
    VSIndices,
    Window,
    dense,
    simplify,
)
from maskdsl.codegen.emit_hopper_listed import emit_listed
from maskdsl.codegen.hopper import blocks_of, constants_of
from maskdsl.codegen.hopper_cut import GRAIN, ROWS, TILE
from maskdsl.codegen.hopper_lists import (
    ListedKernels,
    copy_columns,
    heads_told_apart,
    pick_listed,
    schedule_listed,
)
from maskdsl.codegen.planner import make_plan
from maskdsl.dense import dense_attention
from maskdsl.dynamic import slots_of

HEADS, KV_HEADS, BATCH = 4, 1, 1


def numbers_of(t: torch.Tensor) -> Pointer:
    return Pointer(t.numpy().astype(np.int64).ravel())


def launch(mask: Mask, shape: Shape, data: dict[str, Any], q: torch.Tensor, k: torch.Tensor,
           v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `prepare_listed` does, with the emitted kernel run by threads."""
    kinds = heads_told_apart(make_plan(mask, ROWS, GRAIN, TILE), data, HEADS)
    config = pick_listed(mask, HEADS // KV_HEADS, HEADS // kinds, q.shape[3])
    plan = make_plan(mask, config.span, GRAIN, TILE)
    kernels = ListedKernels(plan)
    tables = kernels.prepare(shape, BATCH, HEADS, KV_HEADS, data, torch.device("cpu"))
    copies = [copy_columns(tables, t.float()) for t in (k, v)] if plan.lists.columns else []
    groups = HEADS // config.heads_packed
    cut = schedule_listed(config, shape, groups * BATCH,
                          HEADS // KV_HEADS // config.heads_packed)
    dims = q.shape[3], v.shape[3]
    blocks = blocks_of(config, *dims)
    boxes = [*zip((q, k, v, k, v), blocks, strict=False), *((c, blocks[3]) for c in copies)]
    more = [numbers_of(x) if isinstance(x, torch.Tensor) else x
            for x in kernels.arguments(tables)]
    numbers = [cut.items, cut.q_tiles, groups * BATCH, groups, cut.section, 0, 0, 1,
               HEADS // KV_HEADS, cut.q_tiles * cut.section, 0, cut.section, 0, groups, 0,
               shape.q_len, shape.kv_len, shape.q_offset, shape.total_len]
    out = np.full((BATCH, HEADS, shape.q_len, v.shape[3]), np.nan)
    lse = Pointer(np.full(BATCH * HEADS * shape.q_len, np.nan))
    run_forward(emit_listed(plan), constants_of(config, True),
                [Descriptor(t.double().numpy(), block) for t, block in boxes], out, lse, numbers,
                more, q.shape[3] ** -0.5 * 1.4426950408889634, seed=len(repr(mask)))
    return torch.from_numpy(out), torch.from_numpy(lse.memory).view(BATCH, HEADS, -1)


def make_data(mask: Mask, length: int, heads: int) -> dict[str, Any]:
    """Lists with runs, sentinels, duplicates and entries beyond the end."""
    generator = torch.Generator().manual_seed(heads)

    def numbers(*size: int) -> torch.Tensor:
        return torch.randint(-1, length + 50, (1, heads, *size), generator=generator)

    runs = (numbers(4)[..., None] + torch.arange(64)).flatten(-2)
    live = torch.rand(1, heads, -(-length // 128), -(-length // 128), generator=generator) < 0.5
    data = {"vs": VSIndices(numbers(90), runs), "loose": VSIndices(numbers(9), numbers(12)),
            "cols": ColumnIndices(numbers(70)), "blk": BlockIndices.from_mask(live, 128, 128)}
    return {atom.slot: data[atom.slot] for atom in slots_of(mask)}


@pytest.mark.parametrize(("mask", "heads", "dim"), [
    (VerticalSlash("vs"), 4, 128), (VerticalSlash("vs"), 2, 64),
    (Sink(8) | Window(70) | LastQ(40) | VerticalSlash("vs"), 4, 64),
    (Sink(8) | Window(70) | VerticalSlash("vs"), 1, 64),
    (Columns("cols") | VerticalSlash("vs"), 4, 64), (Columns("cols"), 1, 64),
    (Blocks("blk", 128, 128) | Sink(4), 1, 128), (Blocks("blk", 128, 128) - Window(64), 4, 64),
    (VerticalSlash("loose") | Blocks("blk", 128, 128), 4, 64)], ids=repr)
def test_values_and_lse(mask: Mask, heads: int, dim: int) -> None:
    """Lists for all heads, for pairs of them and for each: four, two and one head an item."""
    whole, shape = simplify(Causal() & mask), Shape(330, 460)
    data = make_data(whole, 460, heads)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(BATCH, h, n, dim, generator=generator, dtype=torch.float64)
               for h, n in ((HEADS, 330), (KV_HEADS, 460), (KV_HEADS, 460)))
    out, lse = launch(whole, shape, data, q, k, v)
    live = dense(whole, shape, BATCH, HEADS, "cpu", data)
    exact, exact_lse = dense_attention(q, k.float().double(), v.float().double(), live)
    torch.testing.assert_close(lse, exact_lse, atol=1e-6, rtol=0)
    torch.testing.assert_close(out, exact, atol=1e-6, rtol=1e-6)
