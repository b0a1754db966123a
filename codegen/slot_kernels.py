# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""Kernels that turn call-time indices into sets of bits and lists, on the GPU without a host sync.

A set is int32 words of 32 bits, the last word empty. `before` counts the bits of earlier words, so
that "how many lie below x" is two loads (the emitted kernels' `count_below`).
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(-(1 << 30))


@triton.jit
def count_bits(word):
    """Set bits of int32 words."""
    bits = word.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (((bits + (bits >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24
    return bits.to(tl.int32)


@triton.jit
def highest_bit(word):
    """The number of the highest set bit of int32 words; -1 for 0."""
    bits = word.to(tl.uint32, bitcast=True)
    bits = bits | (bits >> 1)
    bits = bits | (bits >> 2)
    bits = bits | (bits >> 4)
    bits = bits | (bits >> 8)
    bits = bits | (bits >> 16)
    return count_bits(bits.to(tl.int32, bitcast=True)) - 1


@triton.jit
def set_bits(index, row, words, count, rows, limit, row_words, shift, HAS_ROW: tl.constexpr,
             BACKWARDS: tl.constexpr, BLOCK: tl.constexpr):
    """Set bit `index` of each list's set; with rows, of set `row` among the list's `rows` sets;
    backwards, bit limit - 1 - index.

    index, row  int32 or int64 [lists, count]; entries outside [0, limit) or [0, rows) are dropped
    words       int32 [lists, rows, row_words], zero before
    shift       bits before bit 0
    """
    this = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(index + this * count + i, mask=i < count, other=-1)
    inside = (x >= 0) & (x < limit)
    at = tl.zeros([BLOCK], tl.int64) + this * rows
    if HAS_ROW:
        m = tl.load(row + this * count + i, mask=i < count, other=-1)
        inside = inside & (m >= 0) & (m < rows)
        at += m
    bit = tl.where(inside, limit - 1 - x if BACKWARDS else x, 0).to(tl.int32) + shift
    one = tl.full([BLOCK], 1, tl.int32)
    tl.atomic_or(words + (at * row_words + (bit >> 5)), one << (bit & 31), mask=inside)


@triton.jit
def pack_bits(mask, words, rows, columns, stride_l, stride_r, row_words, BLOCK: tl.constexpr):
    """Boolean rows as sets: mask bool [lists, rows, columns] --> words int32 [.., row_words]."""
    this = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = w[:, None] * 32 + tl.arange(0, 32)[None, :]
    line = mask + (this // rows) * stride_l + (this % rows) * stride_r
    bits = tl.load(line + x, mask=x < columns, other=0).to(tl.int32)
    word = tl.sum((bits != 0).to(tl.int32) << tl.arange(0, 32)[None, :], 1)
    tl.store(words + this * row_words + w, word, mask=w < row_words)


@triton.jit
def larger(a, b):
    """The combine function of a running maximum."""
    return tl.maximum(a, b)


@triton.jit
def rank_bits(words, before, last, row_words, WITH_LAST: tl.constexpr, BLOCK: tl.constexpr):
    """Bits in earlier words (before), and the highest bit up to and in each word (last)."""
    this = tl.program_id(0).to(tl.int64) * row_words
    done = tl.zeros([], tl.int32)
    high = tl.full([], NONE, tl.int32)
    for base in range(0, row_words, BLOCK):
        w = base + tl.arange(0, BLOCK)
        word = tl.load(words + this + w, mask=w < row_words, other=0)
        bits = count_bits(word)
        tl.store(before + this + w, done + tl.cumsum(bits, 0) - bits, mask=w < row_words)
        done += tl.sum(bits, 0)
        if WITH_LAST:
            top = tl.where(word == 0, NONE, w * 32 + highest_bit(word))
            running = tl.maximum(tl.associative_scan(top, 0, larger), high)
            tl.store(last + this + w, running, mask=w < row_words)
            high = tl.max(running, 0)


@triton.jit
def list_bits(words, before, out, row_words, capacity, shift, BLOCK: tl.constexpr,
              SETS: tl.constexpr = 1):
    """A set as the rising list of its members less `shift`; SETS sets in a row share one list."""
    this = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + this * row_words + w, mask=w < row_words, other=0)
    start = tl.load(before + this * row_words + w, mask=w < row_words, other=0)
    bit = tl.arange(0, 32)[None, :]
    held = ((word[:, None] >> bit) & 1) != 0
    below = tl.full([1, 32], 1, tl.int32) << bit
    place = start[:, None] + count_bits(word[:, None] & (below - 1))
    tl.store(out + this // SETS * capacity + place, w[:, None] * 32 + bit - shift,
             mask=held & (place < capacity))


@triton.jit
def cover_slashes(slashes, last, marks, covered, slash_words, mark_words, reach,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Choose the tiles that cover all slashes of one head, farthest first, as few as can be.

    For the rows p_first.. of any query tile a slash s lies on keys p_first - s .. p_last - s, that
    is at distances s - BLOCK_M + 1 .. s from p_first, whichever tile it is: one list of distances
    serves them all. Tile d holds the keys [p_first - d, p_first - d + BLOCK_N). Starting at the
    farthest distance that is not covered, the next tile begins right there.

    marks    int32 [lists, mark_words], zero before: bit d + BLOCK_M - 1 for every tile d
    covered  likewise: bit o + BLOCK_M + BLOCK_N for every distance o that lies in a tile
    """
    this = tl.program_id(0).to(tl.int64)
    slashes += this * slash_words
    last += this * slash_words
    marks += this * mark_words
    covered += this * mark_words
    one = tl.full([], 1, tl.int64)
    far = reach - 1
    while far > -BLOCK_M:
        top = far + BLOCK_M - 1
        word = tl.load(slashes + (top >> 5)) & ((2 << (top & 31)) - 1)
        earlier = tl.load(last + (top >> 5) - 1, mask=top >= 32, other=NONE)
        high = tl.where(word == 0, earlier, (top >> 5) * 32 + highest_bit(word))
        if high >= 0:
            found = tl.minimum(far, high)
            place = found + BLOCK_M - 1
            old = tl.load(marks + (place >> 5))
            tl.store(marks + (place >> 5), old | (1 << (place & 31)))
            low = found + BLOCK_M + 1  # the tile's lowest distance as a bit of `covered`
            for part in tl.static_range((BLOCK_N + 31) // 32 + 1):
                start = tl.maximum(low - ((low >> 5) + part) * 32, 0)
                stop = tl.minimum(low + BLOCK_N - ((low >> 5) + part) * 32, 32)
                bits = ((one << stop.to(tl.int64)) - 1) & ~((one << start.to(tl.int64)) - 1)
                old = tl.load(covered + (low >> 5) + part)
                new = old | tl.where(stop > start, bits, 0).to(tl.int32)
                tl.store(covered + (low >> 5) + part, new)
            far = found - BLOCK_N
        else:
            far = far * 0 - BLOCK_M


@triton.jit
def widen_slashes(slashes, table, count, rows, row_words, q_offset, LANES: tl.constexpr):
    """Blocks of 64 keys for every 64 query rows, by MInference's rule; see
    `maskdsl.binding.widen_slashes`.

    slashes  int32 [lists, count], falling; table int32 [lists, rows, row_words], zero before
    """
    this = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * LANES + tl.arange(0, LANES)
    end = q_offset + (m + 1) * 64
    line = table + (this * rows + m) * row_words
    reached = tl.full([LANES], NONE, tl.int32)
    ones = tl.full([LANES], -1, tl.int32)
    for i in range(0, count):
        s = tl.load(slashes + this * count + i)
        stop = tl.maximum(end - s, 64)
        known = (s >= 0) & (s < end) & (m < rows)
        fresh = known & (stop > reached + 64)
        longer = known & (stop <= reached + 64) & (stop > reached)
        reached = tl.where(fresh, stop, tl.where(longer, reached + 64, reached))
        begin = tl.maximum(reached - 64, 0)
        w, shift = begin >> 5, begin & 31
        hit = fresh | longer
        tl.atomic_or(line + w, ones << shift, mask=hit & (w < row_words))
        tl.atomic_or(line + w + 1, ones, mask=hit & (w + 1 < row_words))
        tl.atomic_or(line + w + 2, ~(ones << shift), mask=hit & (w + 2 < row_words))
