"""Laws 5 and 6: the plan visits each live tile once, and its text is the mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np
import numpy.typing as npt
from hypothesis import given
from strategies import masks, shapes, tile_sizes

from maskdsl import (
    Causal,
    LastQ,
    Mask,
    RandomBlocks,
    Shape,
    Sink,
    Stride,
    Vertical,
    Window,
    dense,
    simplify,
)
from maskdsl.codegen.bounds import bound_pieces
from maskdsl.codegen.plan import Plan, cover_tiles
from maskdsl.codegen.planner import make_plan
from maskdsl.codegen.sieve import write_sieve
from maskdsl.expr import Not
from maskdsl.text import NUMPY_NAMES
from maskdsl.tiles import names_of

Bools = npt.NDArray[np.bool_]


def plan_of(mask: Mask, tile: tuple[int, int]) -> Plan:
    return make_plan(simplify(mask), *tile)


def always_sieved(plan: Plan) -> Plan:
    """The plan with its dead-tile test, also where the cost model leaves it out."""
    ranges = bound_pieces(plan.pieces, plan.block_n).ranges
    return replace(plan, sieve=write_sieve(plan.pieces, ranges))


def tiles_of(plan: Plan, live: Bools) -> tuple[Bools, Bools]:
    """(any, all) of every tile; a tile cut off by the last key is never wholly live."""
    rows, columns = -(-live.shape[0] // plan.block_m), -(-live.shape[1] // plan.block_n)
    some, every = np.zeros((rows, columns), bool), np.zeros((rows, columns), bool)
    for i in range(rows):
        for j in range(columns):
            tile = live[i * plan.block_m:(i + 1) * plan.block_m,
                        j * plan.block_n:(j + 1) * plan.block_n]
            some[i, j] = tile.any()
            every[i, j] = tile.all() and (j + 1) * plan.block_n <= live.shape[1]
    return some, every


def coverage(plan: Plan, shape: Shape) -> npt.NDArray[np.int64]:
    """How often the two loops together visit each tile, before any sieve."""
    values = plan.run_bounds(shape)
    tiles = np.arange(-(-shape.kv_len // plan.block_n))
    rows = len(values["p_first"])
    return cover_tiles(plan.segments(plan.full, values), tiles, rows) + \
        cover_tiles(plan.segments(plan.masked, values), tiles, rows)


@given(masks(), shapes(), tile_sizes())
def test_every_tile_is_visited_at_most_once(mask: Mask, shape: Shape,
                                            tile: tuple[int, int]) -> None:
    plan = plan_of(mask, tile)
    assert (coverage(plan, shape) <= 1).all()
    values = plan.run_bounds(shape)
    for start, stop in plan.segments(plan.full + plan.masked, values):
        assert (stop >= start).all()


@given(masks(), shapes(), tile_sizes())
def test_every_live_tile_is_visited_also_through_a_sieve(mask: Mask, shape: Shape,
                                                         tile: tuple[int, int]) -> None:
    plan = plan_of(mask, tile)
    some, _ = tiles_of(plan, dense(mask, shape)[0, 0].numpy())
    for one in (plan, always_sieved(plan)):
        visits = one.visit(shape)
        assert ((visits.full | visits.masked) >= some).all()


@given(masks(), shapes(), tile_sizes())
def test_full_tiles_are_live_throughout(mask: Mask, shape: Shape, tile: tuple[int, int]) -> None:
    plan = plan_of(mask, tile)
    _, every = tiles_of(plan, dense(mask, shape)[0, 0].numpy())
    assert (plan.visit(shape).full <= every).all()


@given(masks(), shapes(), tile_sizes())
def test_dead_tiles_are_visited_only_for_pieces_with_jumps(mask: Mask, shape: Shape,
                                                           tile: tuple[int, int]) -> None:
    plan = plan_of(mask, tile)
    some, _ = tiles_of(plan, dense(mask, shape)[0, 0].numpy())
    visits = plan.visit(shape)
    dead = (visits.full | visits.masked) & ~some
    values = plan.run_bounds(shape)
    tiles = np.arange(some.shape[1])
    excused = np.zeros_like(dead)
    ranges = bound_pieces(plan.pieces, plan.block_n).ranges
    for piece, span in zip(plan.pieces, ranges, strict=True):
        if not piece.is_affine:
            start, stop = (np.broadcast_to(eval(text, dict(values)), len(values["p_first"]))
                           for text in (span.start, span.stop))
            excused |= (tiles >= start[:, None]) & (tiles < stop[:, None])
    assert (dead <= excused).all()


@given(masks(), shapes())
def test_the_emitted_mask_text_is_the_mask(mask: Mask, shape: Shape) -> None:
    plan = plan_of(mask, (16, 16))
    values: dict[str, Any] = {**NUMPY_NAMES, **names_of(shape)}
    values["p"] = np.arange(shape.q_len)[:, None] + shape.q_offset
    values["k"] = np.arange(shape.kv_len)[None, :]
    expected = dense(mask, shape)[0, 0].numpy()
    if expected.size:
        exec("\n".join(plan.rows), values)
        assert (np.broadcast_to(eval(plan.live, values), expected.shape) == expected).all()


@given(masks(), shapes(), tile_sizes())
def test_counting_tiles_needs_no_table(mask: Mask, shape: Shape, tile: tuple[int, int]) -> None:
    plan = plan_of(mask, tile)
    visits = plan.visit(shape)
    assert plan.count_tiles(shape) == (visits.full.sum(), visits.masked.sum())


@given(masks())
def test_the_graph_is_a_dag_that_ends_in_the_kernel(mask: Mask) -> None:
    graph = plan_of(mask, (16, 16)).graph
    assert nx.is_directed_acyclic_graph(graph)
    assert all(repr(node) in graph for node in simplify(mask).walk())
    assert [n for n in graph if graph.out_degree(n) == 0] == ["kernel"]


def test_the_triangle_has_the_segments_one_would_write_by_hand() -> None:
    plan = plan_of(Causal() & (Sink(4) | Window(2048) | LastQ(64)), (64, 64))
    assert (len(plan.full), len(plan.masked)) == (2, 3)  # prefix and band; sink, low edge, diagonal
    full, masked = plan.count_tiles(Shape(32768, 32768))
    by_hand = sum(max(0, i - max(0, i - 31)) for i in range(511)) + 511
    assert full == by_hand
    assert full + masked <= 511 * 34 + 512


def test_a_sieve_skips_what_a_period_leaves_out() -> None:
    assert plan_of(Stride(8), (64, 64)).sieve is None  # every tile holds one: nothing to skip
    plan = plan_of(Stride(512), (64, 64))
    assert plan.count_tiles(Shape(8192, 8192)) == (0, 128 * 16)
    blocks = plan_of(RandomBlocks(64, 2), (64, 64))
    assert blocks.count_tiles(Shape(8192, 8192))[1] <= 128 * 2


def test_many_pieces_keep_the_full_tiles_of_the_wide_ones() -> None:
    """More pieces than a kernel takes: those that can fill no tile are drawn together first."""
    wide = Causal() & (Window(2048) | Stride(8))
    many = Causal() & (Window(2048) | RandomBlocks(64, 9) | Vertical(tuple(range(0, 900, 90))))
    shape = Shape(8192, 8192)
    assert plan_of(many, (64, 64)).count_tiles(shape)[0] == \
        plan_of(wide, (64, 64)).count_tiles(shape)[0] > 0


def test_no_plan_depends_on_the_length() -> None:
    plan = plan_of(Window(100) | ~Not(Sink(3)), (64, 64))
    text = "\n".join((*plan.bounds, *plan.rows, plan.live))
    assert "table" not in text
    assert {"kv_len", "p_first", "p_last"} <= set(text.replace("(", " ").replace(",", " ").split())
