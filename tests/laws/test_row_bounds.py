"""Laws 5 and 6 by key tile: each live tile is visited once, and a FULL one is live throughout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import masks, shapes, tile_sizes

from maskdsl import (
    Causal,
    Chunk,
    Document,
    Documents,
    Full,
    LastQ,
    Mask,
    PrefixLM,
    RandomBlocks,
    Shape,
    Sink,
    Stride,
    Window,
    dense,
    simplify,
)
from maskdsl.binding import bind_slots
from maskdsl.codegen.bounds import bound_pieces
from maskdsl.codegen.planner import make_plan
from maskdsl.codegen.row_bounds import KeyPlan, first_row, make_key_plan
from maskdsl.codegen.sieve import write_sieve
from maskdsl.dynamic import slots_of
from maskdsl.trace import P


def key_plan_of(mask: Mask, tile: tuple[int, int]) -> KeyPlan:
    return make_key_plan(make_plan(simplify(mask), *tile))


def check_visits(made: KeyPlan, mask: Mask, shape: Shape, head: int,
                 slots: dict[str, Any] | None = None) -> None:
    live = dense(mask, shape, 1, head + 1, slots=slots)[0, -1].numpy()
    bound = bind_slots(mask, slots, shape) if slots else None
    block_m, block_n = made.plan.block_m, made.plan.block_n
    visits = made.visit(shape, 0, head, bound)
    assert not (visits.full & visits.masked).any()
    for i in range(-(-shape.q_len // block_m)):
        for j in range(-(-shape.kv_len // block_n)):
            tile = live[i * block_m:(i + 1) * block_m, j * block_n:(j + 1) * block_n]
            assert not tile.any() or visits.full[i, j] or visits.masked[i, j], (i, j)
            assert tile.all() or not visits.full[i, j], (i, j)
    values = made.run_bounds(shape, 0, head, bound)
    for which in (made.full, made.masked):  # no segment runs backwards, or over a tile twice
        covered = np.zeros((visits.full.shape[0], visits.full.shape[1]), dtype=np.int64)
        rows = np.arange(covered.shape[0])[:, None]
        for segment in which:
            start, stop = (np.broadcast_to(eval(x, values), covered.shape[1:])
                           for x in (segment.start, segment.stop))
            assert (start <= stop).all() and (start >= 0).all()
            assert ((stop == start) | (stop <= covered.shape[0])).all()
            covered += (rows >= start) & (rows < stop)
        assert (covered <= 1).all()


@settings(max_examples=150)
@given(masks(), shapes(), tile_sizes(), st.integers(0, 1))
@example(Full(), Shape(33, 33), (16, 16), 0)
@example(Causal(), Shape(40, 9, -31), (16, 8), 0)
def test_live_tiles_are_visited_once_by_key_tile(mask: Mask, shape: Shape, tile: tuple[int, int],
                                                 head: int) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        check_visits(key_plan_of(mask, tile), mask, shape, head)


@settings(max_examples=80)
@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 30)), min_size=1, max_size=8),
       st.one_of(st.just(Full()), masks(3)), st.sampled_from(["&", "|", "-", "not"]),
       tile_sizes(), st.integers(0, 40))
@example([(0, 20), (-1, 3), (1, 20), (-1, 1)], Full(), "not", (16, 1), 0)
def test_documents_turn_round(runs: list[tuple[int, int]], other: Mask, how: str,
                              tile: tuple[int, int], offset: int) -> None:
    """Rows that see a key are those of its document; padding, with none, sees nothing."""
    ids = [0 if kind < 0 else n + 1 for n, (kind, size) in enumerate(runs) for _ in range(size)]
    data = Documents.from_ids(torch.tensor([[i - 1 for i in ids]]))
    doc = Document("doc")
    mask = {"&": doc & other, "|": doc | other, "-": other - doc, "not": Full() - doc}[how]
    shape = Shape(max(len(ids) - offset, 1), len(ids), min(offset, len(ids) - 1))
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if len(ids) <= limit and slots_of(mask):
        check_visits(key_plan_of(mask, tile), mask, shape, 0, {"doc": data})


def test_documents_leave_their_tiles_full() -> None:
    """Two documents of 64 tokens in tiles of 16: each has 6 below the diagonal and 4 on it."""
    data = Documents.from_ids(torch.arange(128) // 64)
    shape = Shape(128, 128)
    mask = Causal() & Document("doc")
    visits = key_plan_of(mask, (16, 16)).visit(
        shape, 0, 0, bind_slots(mask, {"doc": data}, shape))
    assert (int(visits.full.sum()), int(visits.masked.sum())) == (12, 8)


@settings(max_examples=60)
@given(masks(), shapes(), tile_sizes())
def test_the_dead_tile_test_skips_no_live_tile(mask: Mask, shape: Shape,
                                               tile: tuple[int, int]) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if max(shape.q_offset + shape.q_len, shape.kv_len) > limit:
        return
    plan = make_plan(simplify(mask), *tile)
    sieve = write_sieve(plan.pieces, bound_pieces(plan.pieces, plan.block_n).ranges)
    check_visits(make_key_plan(replace(plan, sieve=sieve)), mask, shape, 0)


@pytest.mark.parametrize(("mask", "full", "masked"), [
    (Causal(), 28, 8), (Full(), 64, 0), (Causal() & Window(32), 7, 8 + 6),
    (Causal() & Chunk(64), 12, 8), (PrefixLM(32), 28 + 3, 6),
    (Causal() & (Sink(16) | Window(16) | LastQ(16)), 7 + 6, 8 + 5),
])
def test_exact_counts(mask: Mask, full: int, masked: int) -> None:
    """No more tiles than there must be, 128 tokens in tiles of 16."""
    visits = key_plan_of(mask, (16, 16)).visit(Shape(128, 128))
    assert (int(visits.full.sum()), int(visits.masked.sum())) == (full, masked)


@pytest.mark.parametrize("mask", [Causal() & Stride(256), RandomBlocks(64, 2)])
def test_periodic_masks_keep_their_dead_tile_test(mask: Mask) -> None:
    made = key_plan_of(mask, (32, 32))
    shape = Shape(1024, 1024)
    seen = made.visit(shape).masked.sum()
    assert made.sieve is not None and seen < replace(made, sieve=None).visit(shape).masked.sum()


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(-20, 20),
       st.integers(-20, 20), st.booleans())
def test_the_first_row_of_a_term(n: int, a: int, m: int, b: int, value: int, floors: bool) -> None:
    term = n * (sympy.floor((a * P + b) / sympy.Integer(m)) if floors else P) + b
    row = first_row(term, sympy.Integer(value))
    assert row is not None
    assert term.subs(P, row) >= value > term.subs(P, row - 1)
