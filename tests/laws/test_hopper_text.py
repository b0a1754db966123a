"""The Hopper kernel's own text, run on numbers: which keys an item visits and what its masks keep.

The scalar functions of the emitted file (all but loads, products and softmax) are executed here as
Python, for every item of a call, and every pair is counted. (tests/kernel/test_hopper_machine.py
runs the file whole.)
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import masks, shapes

from maskdsl import Causal, FirstQ, Full, LastQ, Mask, Shape, Sink, Where, Window, dense, simplify
from maskdsl.codegen.emit_hopper import emit_hopper
from maskdsl.codegen.hopper import magic
from maskdsl.codegen.hopper_cut import (
    BLOCK_N,
    GRAIN,
    TILE,
    HopperConfig,
    Schedule,
    pick_hopper,
    refuse_mask,
    schedule,
)
from maskdsl.codegen.hopper_work import count_hopper
from maskdsl.codegen.planner import make_plan
from maskdsl.codegen.workload import CallHeads
from maskdsl.text import NUMPY_NAMES

TRIANGLE = Sink(8) | Window(512) | LastQ(128)


def below(bound: Any) -> Any:
    """bmsk.clamp: a word with that many low bits."""
    return (np.int64(1) << np.clip(bound, 0, 32)) - 1


def run_text(source: str) -> dict[str, Any]:
    """The scalar functions of an emitted file as Python functions."""
    start, stop = source.index("FAR = "), source.index("@gluon.jit\ndef named_barrier")
    text = source[start:stop].replace("@gluon.jit\n", "")
    text = re.sub(r"def mask_tile.*?(?=\n\n\n)", "", text, flags=re.DOTALL)
    gl = SimpleNamespace(**vars(NUMPY_NAMES["tl"]), constexpr=lambda x: x, to_tensor=lambda x: x)
    names: dict[str, Any] = {"gl": gl}
    exec(text, names)
    # dividers take the divisor itself here; what the host makes of it has a test of its own
    return names | {"floor_div": lambda a, b: a // b, "modulo": lambda a, b: a % b,
                    "divide": lambda a, divisor, _: a // divisor, "below": below}


class Walk:
    """All items of one call, pair by pair."""

    def __init__(self, mask: Mask, shape: Shape, config: HopperConfig, cut: Schedule,
                 groups: int) -> None:
        self.shape, self.config, self.cut, self.groups = shape, config, cut, groups
        self.plan = make_plan(mask, config.span, GRAIN, TILE)
        source = emit_hopper(self.plan)
        self.words = "def live_words" in source
        self.names = run_text(source)
        for name in ("open_item", "start_of", "grain_at", "full_at", "find_tiles", "live_words",
                     "live_pairs"):
            if name in self.names:  # functions see the replaced helpers
                self.names[name].__globals__.update(
                    {k: self.names[k] for k in ("floor_div", "modulo", "divide", "below")})

    def lengths(self) -> tuple[int, int, int, int]:
        s = self.shape
        return s.q_len, s.kv_len, s.q_offset, s.total_len

    def open(self, item: int) -> tuple[Any, ...]:
        cut, c = self.cut, self.config
        light = (cut.q_tiles - cut.split_count) * cut.section
        return self.names["open_item"](  # type: ignore[no-any-return]
            item, cut.q_tiles, self.groups, self.groups, cut.section, cut.split_first,
            cut.split_count, cut.splits, light, 0, cut.section, 0, self.groups, 0, *self.lengths(),
            c.heads_packed, c.span, c.narrow, BLOCK_N, GRAIN)

    def count(self) -> npt.NDArray[np.int64]:
        """How often each (group, row, key) is kept."""
        times = np.zeros((self.groups, self.shape.q_len, self.shape.kv_len), dtype=np.int64)
        for item in range(self.cut.items):
            self.visit(times, *self.open(item))
        return times

    def visit(self, times: npt.NDArray[np.int64], batch: Any, head: Any, q_tile: Any, part: Any,
              narrow: Any, rest: Any, loose: Any, masked_steps: Any, first: Any, last: Any,
              state: Any) -> None:
        group, grain = int(head) // self.config.heads_packed, GRAIN
        assert batch == 0 and last > first and rest * grain <= self.config.narrow
        rows = np.arange(q_tile * self.config.span, (q_tile + 1) * self.config.span)
        rows = rows[rows < self.shape.q_len]
        for j in range(int(narrow)):
            self.keep(times, group, rows, int(head), j, narrow, state)
        for n in range(int(first), int(last)):
            if n < masked_steps:
                for j in range(TILE):
                    self.keep(times, group, rows, int(head), rest + n * TILE + j, loose, state)
            else:
                at = self.names["full_at"]((n - masked_steps) * TILE, state) * grain
                keys = np.arange(at, at + TILE * grain)
                assert keys[0] >= 0 and keys[-1] < self.shape.kv_len
                times[group][np.ix_(rows, keys)] += 1

    def keep(self, times: npt.NDArray[np.int64], group: int, rows: Any, head: int, j: int,
             count: Any, state: Any) -> None:
        """One loose grain: the mask decides."""
        start = int(self.names["start_of"](j, count, state, GRAIN))
        p = (rows + self.shape.q_offset)[:, None]
        keys = start + np.arange(GRAIN)
        if self.words:
            word = self.names["live_words"](p, np.int64(start), *self.lengths(), 0, head)
            live = (np.broadcast_to(word, p.shape) >> np.arange(GRAIN)) & 1
        else:
            live = np.broadcast_to(self.names["live_pairs"](
                p, keys[None, :], *self.lengths(), 0, head), (len(rows), len(keys)))
        there = keys < self.shape.kv_len
        assert not live[:, ~there].any()
        times[group][np.ix_(rows, keys[there])] += live[:, there].astype(np.int64)


def check(mask: Mask, shape: Shape, group: int = 4, groups: int = 2, processors: int = 2) -> None:
    whole = simplify(mask)
    if refuse_mask(whole) or not shape.q_len or not shape.kv_len:
        return
    config = pick_hopper(whole, group, 128)
    plan = make_plan(whole, config.span, GRAIN, TILE)
    cut = schedule(plan, config, shape, groups, groups, processors)
    times = Walk(whole, shape, config, cut, groups).count()
    for g in range(groups):
        head = g * config.heads_packed
        live = dense(mask, shape, 1, head + 1, "cpu")[0, head if plan.needs_head else 0].numpy()
        assert np.array_equal(times[g], live.astype(np.int64)), (mask, shape, cut)


@given(masks(), shapes(max_len=300), st.sampled_from([1, 2, 4, 6]))
def test_every_live_pair_is_kept_once(mask: Mask, shape: Shape, group: int) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        check(mask, shape, group)


@pytest.mark.parametrize("mask", [
    TRIANGLE & Causal(), Full(), Full() & Causal(), Window(100, 30) | FirstQ(5) | Sink(3),
    (LastQ(40) & Sink(600)) & Causal(), ~Window(300) & Causal(),
    Where(lambda b, h, q, k: (q - k < 40 * (h + 1)) & (q >= k))], ids=lambda m: repr(m)[:40])
@pytest.mark.parametrize("lengths", [(1, 1), (17, 17), (1000, 1000), (1, 1000), (130, 1000),
                                     (700, 333)])
def test_fixed_masks(mask: Mask, lengths: tuple[int, int]) -> None:
    check(mask, Shape(*lengths), 2)


@pytest.mark.parametrize("mask,first", [
    (TRIANGLE & Causal(), False), (FirstQ(40) | Window(64, 1), True)], ids=repr)
def test_heavy_rows_are_cut(mask: Mask, first: bool) -> None:
    """At either end of the call."""
    whole, shape = simplify(mask), Shape(3000, 3000)
    config = pick_hopper(whole, 4, 128)
    plan = make_plan(whole, config.span, GRAIN, TILE)
    cut = schedule(plan, config, shape, 1, 1, 64)
    assert cut.splits > 1 and cut.split_count * config.span >= 40
    assert (cut.split_first == 0) == first
    check(mask, shape, 4, 1, 64)


def check_counts(mask: Mask, shape: Shape, heads: int, kv_heads: int, processors: int) -> None:
    """What `explain` counts, against every item opened by the kernel's own text."""
    whole = simplify(mask)
    if refuse_mask(whole) or not shape.q_len:
        return
    work, cut = count_hopper(whole, shape, CallHeads(1, heads, kv_heads), processors)
    groups, seen = heads // cut.config.heads_packed, work.visited
    assert seen.items == cut.schedule.items and seen.first == seen.items * cut.config.narrow
    walk = Walk(whole, shape, cut.config, cut.schedule, groups)
    full = masked = longest = 0
    for item in range(cut.schedule.items):
        masked_steps, first, last = map(int, walk.open(item)[7:10])
        masked += max(0, min(last, masked_steps) - first)
        full += max(0, last - max(first, masked_steps))
        longest = max(longest, last - first)
    assert (seen.full, seen.masked, seen.longest) == (full, masked, longest), (whole, shape, cut)
    live = dense(mask, shape, 1, heads, "cpu")[0]
    assert work.live_pairs == int(live.sum()) * (heads // len(live))
    if not walk.plan.needs_head:
        assert (sum(row.full for row in work.rows) * groups,
                sum(row.masked for row in work.rows) * groups) == (full, masked)


@given(masks(), shapes(max_len=400), st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 2)]),
       st.sampled_from([1, 2, 16, 132]))
def test_explain_counts_what_items_do(mask: Mask, shape: Shape, heads: tuple[int, int],
                                      processors: int) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        check_counts(mask, shape, *heads, processors)


def test_explain_counts_cut_items_and_heads_that_differ() -> None:
    check_counts(TRIANGLE & Causal(), Shape(3000, 3000), 4, 1, 64)
    work, cut = count_hopper(simplify(TRIANGLE & Causal()), Shape(3000, 3000), CallHeads(1, 4, 1),
                             64)
    assert cut.schedule.splits > 1 and work.visited.items > -(-3000 // cut.config.span)
    check_counts(Where(lambda b, h, q, k: (q - k < 90 * (h + 1)) & (q >= k)), Shape(700, 700), 4, 2,
                 8)


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_magic_divides(divisor: int, number: int) -> None:
    multiplier, shift = magic(divisor)
    assert ((2 * number * (multiplier % 2**32)) >> 32) >> shift == number // divisor
