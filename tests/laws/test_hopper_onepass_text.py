"""The queue of the one-pass Hopper backward: its own text, run on numbers, for every item."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_hopper_backward_text import run_text

from maskdsl import Causal, Full, Mask, Shape, Window, simplify
from maskdsl.codegen.hopper_onepass import OnePass, Sums, segments_of, size_sums

KEYS, ROUND_Q, ROUND_KV, NOTHING, END = range(5)
NAMES: dict[str, Any] = run_text(OnePass(simplify(Causal())).source)


def items_of(sums: Sums) -> list[tuple[int, int, int]]:
    """(kind, unit, place) of every item that has something to do, in the queue's order."""
    chunks = sums.share * sums.span // 128
    found = [tuple(map(int, NAMES["find_item"](np.int64(i), sums.heads, sums.tiles, sums.segments,
                                               chunks, sums.delay)))
             for i in range(sums.items + 3)]
    assert all(kind == END for kind, *_ in found[sums.items:])
    assert all(kind in {KEYS, ROUND_Q, ROUND_KV} for kind, *_ in found[:sums.items])
    return [(kind, unit, place) for kind, unit, place in found[:sums.items] if unit >= 0]


@given(st.builds(Sums, st.integers(1, 4), st.integers(1, 4), st.integers(1, 5),
                 st.sampled_from([128, 256]), st.integers(1, 3), st.integers(1, 7)))
def test_every_item_once_and_after_what_it_waits_for(sums: Sums) -> None:
    chunks, units = sums.share * sums.span // 128, sums.heads * sums.segments
    items = items_of(sums)
    assert sorted(items) == sorted(
        [(KEYS, u, j) for u in range(units) for j in range(sums.tiles)]
        + [(ROUND_Q, u, j) for u in range(units) for j in range(chunks)]
        + [(ROUND_KV, g * sums.segments, j) for g in range(sums.heads) for j in range(sums.tiles)])
    at = {item: i for i, item in enumerate(items)}

    def first(kind: int, unit: int) -> int:
        return at[kind, unit, 0]

    def last(kind: int, unit: int) -> int:
        return max(i for (k, u, _), i in at.items() if (k, u) == (kind, unit))

    for unit in range(units):
        assert first(ROUND_Q, unit) > last(KEYS, unit)
        if unit >= sums.ring:  # the place of its sums
            assert first(KEYS, unit) > last(ROUND_Q, unit - sums.ring)
    for head in range(sums.heads):
        start = head * sums.segments
        assert first(ROUND_KV, start) > last(KEYS, start + sums.segments - 1)
        if head >= 2:
            assert first(KEYS, start) > last(ROUND_KV, start - 2 * sums.segments)


@given(st.integers(1, 40))
def test_every_segment_once(segments: int) -> None:
    found = [int(NAMES["segment_of"](np.int64(i), segments)) for i in range(segments)]
    assert sorted(found) == list(range(segments))


@pytest.mark.parametrize("mask", [Causal(), Full(), Causal() & Window(9000)], ids=repr)
@pytest.mark.parametrize("length", [4096, 5000, 32768])
def test_segments_cover_a_call(mask: Mask, length: int) -> None:
    """Their live tiles, as the kernel's own text counts them."""
    side, shape = OnePass(simplify(mask)), Shape(length, length)
    sums = size_sums(side, shape, 8, 4, 132)
    parts = segments_of(shape, sums.span)
    assert sum(part.q_len for part in parts) == length and len(parts) == sums.segments
    names = run_text(side.source)
    for part in parts:
        live = 0
        for place in range(sums.tiles):
            masked, full, _ = names["meet_tiles"](
                np.int64(place), np.int64(part.q_len), np.int64(part.kv_len),
                np.int64(part.q_offset), np.int64(part.total_len), 128, 64)
            live += int(masked + full > 0)
        assert live == side.count_live(part)
