"""The Hopper kernel's own text, run on numbers: which keys an item visits and what its masks keep.

The scalar functions of the emitted file (all but loads, products and softmax) are executed here as
Python, for every item of a call, and every pair is counted. (tests/kernel/test_hopper_machine.py
runs the file whole.)
"""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import masks, shapes

from maskdsl import (
    Causal,
    Empty,
    FirstQ,
    Full,
    LastQ,
    Mask,
    PerHead,
    RandomBlocks,
    Shape,
    Sink,
    Where,
    Window,
    dense,
    simplify,
)
from maskdsl.codegen.emit_hopper import emit_hopper
from maskdsl.codegen.emit_hopper_sieve import LISTS, PAD
from maskdsl.codegen.forecast import total_pairs, total_visited
from maskdsl.codegen.hopper import magic
from maskdsl.codegen.hopper_cut import (
    GRAIN,
    HopperConfig,
    Schedule,
    count_grains,
    head_groups,
    make_plans,
    parts_of,
    pick_hopper,
    pick_room,
    refuse_dims,
    refuse_mask,
    schedule,
    value_parts,
)
from maskdsl.codegen.hopper_work import count_hopper
from maskdsl.codegen.planner import make_plan
from maskdsl.codegen.workload import CallHeads
from maskdsl.heads import count_heads
from maskdsl.text import NUMPY_NAMES

TRIANGLE = Sink(8) | Window(512) | LastQ(128)


def below(bound: Any) -> Any:
    """bmsk.clamp: a word with that many low bits."""
    return (np.int64(1) << np.clip(bound, 0, 32)) - 1


def run_text(source: str) -> dict[str, Any]:
    """The scalar functions of an emitted file as Python functions."""
    start, stop = source.index("FAR = "), source.index("@gluon.jit\ndef hardware_barrier")
    text = source[start:stop].replace("@gluon.jit\n", "")
    text = re.sub(r"def mask_tile\w*\(.*?(?=\n\n\n)", "", text, flags=re.DOTALL)
    gl = SimpleNamespace(**vars(NUMPY_NAMES["tl"]), constexpr=lambda x: x, to_tensor=lambda x: x,
                         load=lambda pointer: pointer.table[pointer.place],
                         store=lambda pointer, values, mask: pointer.store(values, mask),
                         arange=lambda start, stop, layout: np.arange(start, stop),
                         BlockedLayout=lambda *_: None, num_warps=lambda: 1, program_id=lambda _: 0,
                         associative_scan=lambda values, axis, _: values.cumsum(axis),
                         sum=lambda values, axis: values.sum(axis))
    names: dict[str, Any] = {"gl": gl, "needs_mask": lambda *_: True}
    exec(text, names)
    # dividers take the divisor itself here; what the host makes of it has a test of its own
    return names | {"floor_div": lambda a, b: a // b, "modulo": lambda a, b: a % b,
                    "divide": lambda a, divisor, _: a // divisor, "below": below}


class Pointer:
    """A pointer to int32 in memory."""

    def __init__(self, table: npt.NDArray[np.int64], place: Any = 0) -> None:
        self.table, self.place = table, place

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.table, self.place + more)

    def store(self, values: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_]) -> None:
        """gl.store with a mask."""
        self.table[self.place[mask]] = values[mask]


class Walk:
    """All items of one call, pair by pair."""

    def __init__(self, mask: Mask, shape: Shape, config: HopperConfig, cut: Schedule,
                 groups: int) -> None:
        self.shape, self.config, self.cut, self.groups = shape, config, cut, groups
        self.plan = make_plans(mask, config.span, config.tile)[0]
        kinds = head_groups(mask, config.heads_packed)
        size = LISTS * (-(-shape.kv_len // GRAIN) + PAD)
        self.own_table = Pointer(np.array(sum(kinds, ()) or [-1] * size, dtype=np.int64))
        source = emit_hopper(*make_plans(mask, config.span, config.tile),
                             groups=tuple(map(len, kinds)))
        self.source, self.names = source, run_text(source)
        # functions see the replaced helpers
        self.names["open_item"].__globals__.update(
            {k: self.names[k] for k in ("floor_div", "modulo", "divide", "below")}
            | {name: below for name in self.names if name.startswith("below_")})

    def lengths(self) -> tuple[int, int, int, int]:
        s = self.shape
        return s.q_len, s.kv_len, s.q_offset, s.total_len

    def open(self, item: int) -> tuple[Any, ...]:
        cut, c = self.cut, self.config
        light = (cut.q_tiles - cut.split_count) * cut.section
        found: list[Any] = list(self.names["open_item"](
            item, item, cut.q_tiles, self.groups, self.groups, cut.section, cut.split_first,
            cut.split_count, cut.splits, light, 0, cut.section, 0, self.groups, 0, *self.lengths(),
            self.own_table, c.heads_packed, c.span, c.narrow, c.block_n, GRAIN))
        if self.plan.sieve is not None:
            found[-1] = (*found[-1], self.own_table)
        return tuple(found)

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
        tile = self.config.tile
        assert batch == 0 and last > first and rest * grain <= self.config.narrow
        rows = np.arange(q_tile * self.config.span, (q_tile + 1) * self.config.span)
        rows = rows[rows < self.shape.q_len]
        for j in range(int(narrow)):
            if self.config.narrow == 4 * grain:
                self.loose(times, group, rows, int(head), j, narrow, state)
            else:
                self.keep(times, group, rows, int(head), j, narrow, state)
        for n in range(int(first), int(last)):
            if n < masked_steps:
                for j in range(rest + n * tile, rest + n * tile + tile):
                    self.loose(times, group, rows, int(head), j, loose, state)
            else:
                at = self.names["full_at"]((n - masked_steps) * tile, state) * grain
                keys = np.arange(at, at + tile * grain)
                assert keys[0] >= 0 and keys[-1] < self.shape.kv_len
                times[group][np.ix_(rows, keys)] += 1

    def loose(self, times: npt.NDArray[np.int64], group: int, rows: Any, head: int, j: int,
              count: Any, state: Any) -> None:
        """One loose grain, masked only if it needs it."""
        if self.names["needs_mask"](j, count, state):
            self.keep(times, group, rows, head, j, count, state)
        else:
            at = self.names["grain_at"](j, state) * GRAIN
            times[group][np.ix_(rows, range(at, at + GRAIN))] += 1

    def keep(self, times: npt.NDArray[np.int64], group: int, rows: Any, head: int, j: int,
             count: Any, state: Any) -> None:
        """One loose grain: the mask decides."""
        start = int(self.names["start_of"](j, count, state, GRAIN))
        p = (rows + self.shape.q_offset)[:, None]
        keys = start + np.arange(GRAIN)
        own = f"_{state[0]}" if "mask_tile_0" in self.source else ""  # functions of each kind
        if f"live_words{own}" in self.names:
            word = self.names[f"live_words{own}"](p, np.int64(start), state, *self.lengths(), 0,
                                                  head)
            live = (np.broadcast_to(word, p.shape) >> np.arange(GRAIN)) & 1
        else:
            live = np.broadcast_to(self.names[f"live_pairs{own}"](
                p, keys[None, :], state, *self.lengths(), 0, head), (len(rows), len(keys)))
        there = keys < self.shape.kv_len
        assert not live[:, ~there].any()
        times[group][np.ix_(rows, keys[there])] += live[:, there].astype(np.int64)


def check(mask: Mask, shape: Shape, group: int = 4, groups: int = 2, processors: int = 2,
          dim: int = 128) -> None:
    whole = simplify(mask)
    if refuse_mask(whole, by_name=True) or not shape.q_len or not shape.kv_len:
        return
    config = pick_hopper(whole, group, dim)
    groups = (count_heads(whole) or groups * config.heads_packed) // config.heads_packed
    plans = make_plans(whole, config.span, config.tile)
    cut = schedule(plans[0], config, shape, groups, groups, processors, len(plans))
    times = Walk(whole, shape, config, cut, groups).count()
    heads = groups * config.heads_packed
    every = dense(mask, shape, 1, heads, "cpu")[0].expand(heads, -1, -1)
    for g in range(groups):
        head = g * config.heads_packed
        live = every[head].numpy()
        assert np.array_equal(times[g], live.astype(np.int64)), (mask, shape, cut)


@given(masks(), shapes(max_len=300), st.sampled_from([1, 2, 4, 6]), st.sampled_from([128, 256]))
def test_every_live_pair_is_kept_once(mask: Mask, shape: Shape, group: int, dim: int) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        check(mask, shape, group, dim=dim)


@pytest.mark.parametrize("mask", [
    TRIANGLE & Causal(), Full(), Full() & Causal(), Window(100, 30) | FirstQ(5) | Sink(3),
    (LastQ(40) & Sink(600)) & Causal(), ~Window(300) & Causal(),
    Where(lambda b, h, q, k: (q - k < 40 * (h + 1)) & (q >= k))], ids=lambda m: repr(m)[:40])
@pytest.mark.parametrize("lengths", [(1, 1), (17, 17), (1000, 1000), (1, 1000), (130, 1000),
                                     (700, 333)])
def test_fixed_masks(mask: Mask, lengths: tuple[int, int]) -> None:
    check(mask, Shape(*lengths), 2)
    check(mask, Shape(*lengths), 2, dim=256)


KINDS = [  # 8 heads each
    PerHead([Full(), TRIANGLE, TRIANGLE, Full(), Sink(9), Empty(), TRIANGLE, Full()]) & Causal(),
    PerHead([Window(100)] * 4 + [Full()] * 4) & Causal(),
    PerHead([Window(100), Window(100), Sink(40) | FirstQ(7), Sink(40) | FirstQ(7)] * 2),
    PerHead([Where(lambda b, h, q, k: q - k < 40 * (h + 1)), Window(70)] * 4) & Causal(),
    PerHead([Where(lambda b, h, q, k: (q + k) % 3 > 0), LastQ(50)] * 4) & Causal(),
    PerHead([Window(100)] * 8),
]


@pytest.mark.parametrize("mask", KINDS, ids=lambda m: repr(m)[:60])
def test_kinds_of_heads(mask: Mask) -> None:
    """Several masks in one launch: every head walks its own."""
    for lengths, group in [((1000, 1000), 8), ((1, 300), 4), ((130, 1000), 2), ((500, 333), 1)]:
        check(mask, Shape(*lengths), group)
    check_counts(mask, Shape(500, 500), 8, 2, 16)


SIEVED = [
    RandomBlocks(64, 3) | Window(192), Where(lambda b, h, q, k: k % 256 == 0),
    Where(lambda b, h, q, k: (k % 100 < 9) & (q >= 40 * h)) | Sink(3) | LastQ(5),
]


@pytest.mark.parametrize("mask", SIEVED, ids=lambda m: repr(m)[:40])
@pytest.mark.parametrize("causal", [True, False])
def test_dead_grains_are_left_out(mask: Mask, causal: bool) -> None:
    """The planning warp's own list; every live pair once, and most dead grains never."""
    whole = simplify(Causal() & mask) if causal else simplify(mask)
    chance = any(isinstance(node, RandomBlocks | Where) for node in mask.walk())
    assert not refuse_mask(whole, by_name=True)
    assert ("follow no period" in refuse_mask(whole)) == chance
    for lengths, dim in [((1000, 1000), 128), ((1, 300), 128), ((130, 1000), 256)]:
        check(whole, Shape(*lengths), 4, dim=dim)
    check_counts(whole, Shape(700, 700), 4, 2, 8)
    sifted, = make_plans(whole, 32, 4)
    before, _ = count_grains(replace(sifted, sieve=None), Shape(4096, 4096))
    after, _ = count_grains(sifted, Shape(4096, 4096))
    assert after.sum() < 0.7 * before.sum()


def test_heads_share_items_where_they_share_a_mask() -> None:
    for mask, packed in zip(KINDS, (1, 4, 2, 1, 1, 4), strict=True):
        assert pick_hopper(simplify(mask), 4, 128).heads_packed == packed
        assert not refuse_mask(simplify(mask))


@pytest.mark.parametrize("mask,first", [
    (TRIANGLE & Causal(), False), (FirstQ(40) | Window(64, 1), True)], ids=repr)
def test_heavy_rows_are_cut(mask: Mask, first: bool) -> None:
    """At either end of the call."""
    whole, shape = simplify(mask), Shape(3000, 3000)
    config = pick_hopper(whole, 4, 128)
    plan = make_plan(whole, config.span, GRAIN, config.tile)
    cut = schedule(plan, config, shape, 1, 1, 64)
    assert cut.splits > 1 and cut.split_count * config.span >= 40
    assert (cut.split_first == 0) == first
    check(mask, shape, 4, 1, 64)
    check(mask, shape, 4, 1, 64, dim=256)


def test_rings_fit_shared_memory() -> None:
    """Every pair of head dimensions has a room; the best known is kept."""
    assert pick_room(128, 128) == (2, 128, 2, 3) and pick_room(64, 64) == (2, 128, 4, 4)
    assert pick_room(64, 64, rows=192) == (2, 128, 4, 4)
    kinds = [simplify(Causal() & PerHead(heads)) for heads in ([Full(), TRIANGLE],
                                                              [TRIANGLE, Full()])]
    assert [pick_hopper(m, 2, 64).computing for m in (simplify(Causal()), *kinds)] == [3, 2, 2]
    assert pick_room(256, 256) == (1, 64, 2, 2) and pick_room(192, 128) == (1, 128, 2, 2)
    for dim in range(8, 257, 8):
        for value_dim in range(8, dim + 1, 8):
            for padded in (True, False):
                if refuse_dims(dim, value_dim):
                    continue
                letters, keys, k_slots, v_slots = pick_room(dim, value_dim, padded)
                (parts, wide), (many, narrow) = (parts_of(dim, padded),
                                                 value_parts(dim, value_dim, padded))
                assert many * narrow >= value_dim and parts * wide >= dim and wide % narrow == 0
                # the output takes the place of the queries, or a place of its own
                assert many * narrow <= parts * wide
                output = 2 * 64 * narrow * (letters == 1)
                assert 2 * (letters * 128 * parts * wide + output + keys * (
                    k_slots * parts * wide + v_slots * many * narrow)) <= 229376


def check_counts(mask: Mask, shape: Shape, heads: int, kv_heads: int, processors: int) -> None:
    """What `explain` counts, against every item opened by the kernel's own text."""
    whole = simplify(mask)
    if refuse_mask(whole, by_name=True) or not shape.q_len:
        return
    works, cut = count_hopper(whole, shape, CallHeads(1, heads, kv_heads), processors)
    groups, seen = heads // cut.config.heads_packed, total_visited(works)
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
    assert total_pairs(works) == int(live.sum()) * (heads // len(live))
    work = works[0]
    if not walk.plan.needs_head and len(works) == 1:
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
    (work,), cut = count_hopper(simplify(TRIANGLE & Causal()), Shape(3000, 3000),
                                CallHeads(1, 4, 1), 64)
    assert cut.schedule.splits > 1 and work.visited.items > -(-3000 // cut.config.span)
    check_counts(Where(lambda b, h, q, k: (q - k < 90 * (h + 1)) & (q >= k)), Shape(700, 700), 4, 2,
                 8)


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_magic_divides(divisor: int, number: int) -> None:
    multiplier, shift = magic(divisor)
    assert ((2 * number * (multiplier % 2**32)) >> 32) >> shift == number // divisor
