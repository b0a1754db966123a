# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# ruff: noqa: PLR0913, PLR0917
"""Kernels that prepare call-time data for the Hopper kernel. Plain Triton, the same for every mask.

Sets are int32 words of 32 bits with an empty word at the end; `before` counts the bits of earlier
words (`slot_kernels`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskdsl.codegen.slot_kernels import count_bits


@triton.jit
def bits_below(words, before, place, size):
    """How many bits lie below each `place`."""
    place = tl.minimum(tl.maximum(place, 0), size * 32 - 32)
    one = tl.full(place.shape, 1, tl.int32)
    word = tl.load(words + (place >> 5)) & ((one << (place & 31)) - 1)
    return tl.load(before + (place >> 5)) + count_bits(word)


@triton.jit
def part_sides(slashes, before, marks, parts, slash_words, mark_words, HALF: tl.constexpr,
               GRAIN: tl.constexpr, BLOCK: tl.constexpr):
    """Part the grains at a distance by the warp groups whose rows see any pair of them.

    A grain d holds the keys [p - d, p - d + GRAIN) of an item whose first position is p; group 0
    has its first HALF positions, group 1 the next. Row r of an item meets slash s in that grain
    where d - GRAIN < s - r <= d.

    slashes, before  int32 [lists, slash_words]: a set and its ranks
    marks            int32 [lists, mark_words]: bit d + 2 HALF - 1 for every grain d
    parts            int32 [lists, 3, mark_words]: grains seen by both, by group 0, by group 1
    """
    this = tl.program_id(0).to(tl.int64)
    slashes += this * slash_words
    before += this * slash_words
    w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(marks + this * mark_words + w, mask=w < mark_words, other=0)
    bit = tl.arange(0, 32)[None, :]
    held = ((word[:, None] >> bit) & 1) != 0
    d = w[:, None] * 32 + bit - (2 * HALF - 1)
    one = tl.full([1, 32], 1, tl.int32) << bit
    middle = bits_below(slashes, before, d + HALF, slash_words)
    zero = middle > bits_below(slashes, before, d - GRAIN + 1, slash_words)
    last = bits_below(slashes, before, d + 2 * HALF, slash_words)
    first = bits_below(slashes, before, d + HALF - GRAIN + 1, slash_words)
    other = last > first
    out = parts + this * 3 * mark_words + w
    inside = w < mark_words
    tl.store(out, tl.sum(tl.where(held & zero & other, one, 0), 1), mask=inside)
    tl.store(out + mark_words, tl.sum(tl.where(held & zero & ~other, one, 0), 1), mask=inside)
    tl.store(out + 2 * mark_words, tl.sum(tl.where(held & ~zero & other, one, 0), 1), mask=inside)


@triton.jit
def spread_bits(words, before, out, stride, row_words, FIRST: tl.constexpr, COUNT: tl.constexpr,
                BLOCK: tl.constexpr):
    """Sets whose bit x is set where any of the bits x - FIRST - COUNT + 1 .. x - FIRST is.

    words, before  lists of row_words int32, `stride` apart; out int32 [lists, row_words]
    """
    this = tl.program_id(0).to(tl.int64)
    words += this * stride
    before += this * stride
    w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 32)[None, :]
    x = w[:, None] * 32 + bit
    some = bits_below(words, before, x - FIRST + 1, row_words) > \
        bits_below(words, before, x - FIRST - COUNT + 1, row_words)
    one = tl.full([1, 32], 1, tl.int32) << bit
    tl.store(out + this * row_words + w, tl.sum(tl.where(some, one, 0), 1), mask=w < row_words)


@triton.jit
def copy_columns(source, members, before, out, stride_b, stride_h, stride_l, heads, kv_heads,
                 list_batch, list_heads, capacity, list_words, DIM: tl.constexpr,
                 WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROW: tl.constexpr):
    """The rows of k or v that a list of columns names, one after the other; 0 behind them.

    source   [B, kv_heads, L, DIM]; out [B, heads, capacity, ROW]
    members  int32 [list_batch, list_heads, capacity], rising; before: ranks, which tell how many
    """
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // heads, program % heads
    row = tl.where(list_batch > 1, batch, 0) * list_heads + head * list_heads // heads
    count = tl.load(before + row * list_words + list_words - 1)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(members + row * capacity + i, mask=i < tl.minimum(count, capacity), other=-1)
    column = tl.arange(0, WIDTH)[None, :]
    base = source + batch * stride_b + (head * kv_heads // heads) * stride_h
    text = tl.load(base + key[:, None].to(tl.int64) * stride_l + column,
                   mask=(key[:, None] >= 0) & (column < DIM), other=0.0)
    tl.store(out + (program * capacity + i[:, None]) * ROW + column, text,
             mask=(i[:, None] < capacity) & (column < DIM))
