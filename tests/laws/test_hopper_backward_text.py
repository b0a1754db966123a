"""The Hopper backward's own text, run on numbers: which rows an item meets and what its masks keep.

As in test_hopper_text: the scalar functions of the emitted file are executed as Python, for every
item and step of a call, and every pair of every query head is counted.
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

from maskdsl import Causal, Chunk, FirstQ, Full, LastQ, Mask, Shape, Sink, Window, dense, simplify
from maskdsl.codegen.hopper_backward_cut import (
    KeySide,
    QuerySide,
    Side,
    cut_call,
    refuse_mask,
    section_of,
)
from maskdsl.codegen.hopper_cut import Schedule
from maskdsl.text import NUMPY_NAMES

TRIANGLE = Sink(8) | Window(512) | LastQ(128)
SIDES = (KeySide, QuerySide)
ROWS, HALF = 128, 64


def below(bound: Any) -> Any:
    """bmsk.clamp: a word with that many low bits."""
    return (np.int64(1) << np.clip(bound, 0, 32)) - 1


def run_text(source: str) -> dict[str, Any]:
    """The scalar functions of an emitted file as Python functions."""
    start, stop = source.index("FAR = "), source.index("@gluon.jit\ndef advance")
    text = source[start:stop].replace("@gluon.jit\n", "")
    text = re.sub(r"def (mask_tile|below|floor_div|modulo)\(.*?(?=\n\n\n)", "", text,
                  flags=re.DOTALL)
    gl = SimpleNamespace(**vars(NUMPY_NAMES["tl"]), constexpr=lambda x: x, to_tensor=lambda x: x)
    names: dict[str, Any] = {"gl": gl, "below": below, "floor_div": lambda a, b: a // b,
                             "modulo": lambda a, b: a % b}
    exec(text, names)
    return names


class Walk:
    """All items of one call of one side, pair by pair."""

    def __init__(self, side: Side, shape: Shape, cut: Schedule, kv_heads: int) -> None:
        self.side, self.shape, self.cut, self.kv_heads = side, shape, cut, kv_heads
        self.c = SimpleNamespace(**side.constants)
        self.names = run_text(side.source)
        self.groups = kv_heads * (1 if self.c.BY_KEY else side.share // self.c.OWN_HEADS)

    def lengths(self) -> tuple[int, int, int, int]:
        s = self.shape
        return s.q_len, s.kv_len, s.q_offset, s.total_len

    def count(self) -> npt.NDArray[np.int64]:
        """How often each (query head, row, key) is kept."""
        heads = self.kv_heads * self.side.share
        times = np.zeros((heads, self.shape.q_len, self.shape.kv_len), dtype=np.int64)
        cut, c = self.cut, self.c
        for item in range(cut.items):
            (batch, head, tile, _, loose, masked, full, first, last,
             state) = self.names["open_item"](
                item, cut.q_tiles, self.groups, self.groups, cut.section, cut.split_first,
                cut.split_count, cut.splits, self.side.members, *self.lengths(), c.OWN_HEADS,
                c.OWN_SPAN, c.TILE, c.GRAIN)
            assert batch == 0 and last > first
            for n in range(int(first), int(last)):
                member, is_masked, i, start = self.names["place_of"](
                    n, loose, masked, full, self.side.members, state, c.TILE, c.GRAIN)
                starts = [int(start) + j * c.GRAIN for j in range(c.TILE)]
                if is_masked:
                    starts = [int(self.names["start_of"](i + j, loose, state, c.GRAIN))
                              for j in range(c.TILE)]
                self.step(times, int(head), int(tile), int(member), bool(is_masked), starts)
        return times

    def step(self, times: npt.NDArray[np.int64], head: int, tile: int, member: int,
             is_masked: bool, starts: list[int]) -> None:
        """One tile: own rows x the rows that pass, in each of the heads that are met."""
        c, s = self.c, self.shape
        width = HALF // c.PASS_HEADS
        other = np.concatenate([np.arange(at, at + c.GRAIN) for at in starts])
        assert len(other) == width or c.PASS_HEADS == 1
        own = tile * c.OWN_SPAN + np.arange(c.OWN_SPAN)
        rows, keys = (other, own) if c.BY_KEY else (own, other)
        live = np.ones((len(rows), len(keys)), dtype=bool)
        if is_masked:
            live = self.mask(rows, keys)
        elif not c.BY_KEY:
            assert keys[-1] < s.kv_len  # or else dS would be wrong beyond the last key
        there = np.ix_(rows < s.q_len, keys < s.kv_len)
        if not c.BY_KEY:
            assert not live[:, keys >= s.kv_len].any()
        heads = [head * self.side.share + member * c.PASS_HEADS + j
                 for j in range(c.PASS_HEADS)] if c.BY_KEY else \
            [head + j for j in range(c.OWN_HEADS)]
        for h in heads:
            times[h][np.ix_(rows[rows < s.q_len], keys[keys < s.kv_len])] += live[there]

    def mask(self, rows: npt.NDArray[np.int64],
             keys: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """What the emitted mask says, bool[rows, keys]."""
        p = rows + self.shape.q_offset
        if "live_words" not in self.names:
            live = self.names["live_pairs"](p[:, None], keys[None, :], *self.lengths())
            return np.broadcast_to(live, (len(rows), len(keys))).astype(bool)
        own, other = (keys, p) if self.c.BY_KEY else (p, keys)
        parts = []
        for at in range(0, len(other), 32):
            word = self.names["live_words"](own[:, None], np.int64(other[at]), *self.lengths())
            word = np.broadcast_to(word, (len(own), 1))
            parts.append((word >> np.arange(min(32, len(other) - at))) & 1)
        live = np.concatenate(parts, axis=1).astype(bool)
        return live.T if self.c.BY_KEY else live


def check(mask: Mask, shape: Shape, share: int = 4, kv_heads: int = 1,
          processors: int = 2) -> None:
    whole = simplify(mask)
    if refuse_mask(whole) or not shape.q_len or not shape.kv_len:
        return
    live = dense(mask, shape, 1, 1, "cpu")[0, 0].numpy().astype(np.int64)
    for kind in SIDES:
        side = kind(whole, share)
        groups = kv_heads * (share // side.constants["OWN_HEADS"] if kind is QuerySide else 1)
        cut = cut_call(side, shape, groups, section_of(side, shape, 128, groups), processors, 512)
        times = Walk(side, shape, cut, kv_heads).count()
        for found in times:
            assert np.array_equal(found, live), (side, shape, cut)


@given(masks(), shapes(max_len=300), st.sampled_from([1, 2, 3, 4, 6]))
def test_every_live_pair_is_kept_once(mask: Mask, shape: Shape, share: int) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        check(mask, shape, share)


@pytest.mark.parametrize("mask", [
    TRIANGLE & Causal(), Full(), Full() & Causal(), Window(100, 30) | FirstQ(5) | Sink(3),
    (LastQ(40) & Sink(600)) & Causal(), ~Window(300) & Causal(), Chunk(192) & Causal(),
    (Chunk(200) | Window(70)) & Causal()], ids=lambda m: repr(m)[:40])
@pytest.mark.parametrize("lengths", [(1, 1), (17, 17), (900, 900), (1, 900), (130, 900),
                                     (700, 333)])
def test_fixed_masks(mask: Mask, lengths: tuple[int, int]) -> None:
    check(mask, Shape(*lengths), 2, 2)


@pytest.mark.parametrize(("mask", "kind"), [
    (TRIANGLE & Causal(), KeySide), (TRIANGLE & Causal(), QuerySide),
    (FirstQ(40) | Window(64, 1), QuerySide), (Sink(100) | Window(64, 1), KeySide)], ids=repr)
def test_heavy_tiles_are_cut(mask: Mask, kind: Any) -> None:
    """A sink's keys are met by every row, and LastQ rows meet every key."""
    whole, shape = simplify(mask), Shape(3000, 3000)
    side = kind(whole, 4)
    cut = cut_call(side, shape, 1, 1, 64, 512)
    assert cut.splits > 1 and cut.split_count >= 1
    live = dense(mask, shape, 1, 1, "cpu")[0, 0].numpy().astype(np.int64)
    assert (Walk(side, shape, cut, 1).count() == live).all()
