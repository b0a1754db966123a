# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# ruff: noqa: PLR0913, PLR0917
"""Triton kernels of the estimates. Import it through `fused`, which does so only when it launches.

Both kernels see the last `count` queries of each head and all `length` keys; row r sits at
position length - count + r. The `group` query heads of a KV head share each tile of K.

Arguments have no types because Triton evaluates annotations, and are many because it takes every
stride as one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_lse(q, k, parts, q_batch, q_head, q_row, q_dim,
            k_batch, k_head, k_row, k_dim, group, kv_heads,
            count, length, dim, scale,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """parts float32[B, Hkv, splits, G * n]: log2-sum-exp2 of each row over one part of the keys.

    Grid: (tiles of packed rows, splits, B * Hkv). Row tiles come first, so that those that read
    the same keys run side by side and meet in the L2 cache.
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    batch = (tl.program_id(2) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(2) % kv_heads).to(tl.int64)
    packed = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = packed < group * count
    head, row = kv_head * group + packed // count, packed % count
    d = tl.arange(0, BLOCK_D)
    starts = q + batch * q_batch + head * q_head + row.to(tl.int64) * q_row
    queries = tl.load(starts[:, None] + d[None, :] * q_dim,
                      mask=live[:, None] & (d < dim)[None, :], other=0.0)
    position = length - count + row
    tiles = tl.cdiv(tl.cdiv(length, BLOCK_N), splits)  # per split
    top = tl.full([BLOCK_M], -1e30, tl.float32)  # finite, so that no difference is NaN
    total = tl.zeros([BLOCK_M], tl.float32)
    base = k + batch * k_batch + kv_head * k_head
    for tile in range(split * tiles, (split + 1) * tiles):
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        keys = tl.load(base + key.to(tl.int64)[None, :] * k_row + d[:, None] * k_dim,
                       mask=(key < length)[None, :] & (d < dim)[:, None], other=0.0)
        logits = tl.dot(queries, keys, input_precision="ieee") * scale
        logits = tl.where(key[None, :] <= position[:, None], logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(logits - new[:, None]), 1)
        top = new
    out = parts + (tl.program_id(2).to(tl.int64) * splits + split) * (group * count) + packed
    # A part that holds a visible key has total >= 1; without one it stays near -1e30.
    tl.store(out, top + tl.log2(tl.maximum(total, 1.0)), mask=live)


@triton.jit
def column_and_diagonal_sums(q, k, lse, columns, distances,
                             q_batch, q_head, q_row, q_dim, k_batch,
                             k_head, k_row, k_dim, group, kv_heads,
                             count, length, dim, scale,
                             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                             BLOCK_D: tl.constexpr):
    """columns float32[B, Hq, Lk] is stored, distances float32[B, Hq, Lk] is added to.

    Grid: (tiles of keys, B * Hkv). A program loops over the rows of all heads of the group.
    """
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    first_key = tl.program_id(0) * BLOCK_N
    key = first_key + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    keys = tl.load(k + batch * k_batch + kv_head * k_head + key.to(tl.int64)[None, :] * k_row
                   + d[:, None] * k_dim, mask=(key < length)[None, :] & (d < dim)[:, None],
                   other=0.0)
    local = tl.arange(0, BLOCK_M)
    # Diagonal x of a tile holds its elements with column - row = x - (BLOCK_M - 1).
    x = tl.arange(0, BLOCK_M + BLOCK_N)
    column = x[None, :] + local[:, None] - (BLOCK_M - 1)
    inside = (column >= 0) & (column < BLOCK_N)
    column = tl.minimum(tl.maximum(column, 0), BLOCK_N - 1)
    for g in range(group):
        head = kv_head * group + g
        out = (batch * kv_heads * group + head) * length
        sums = tl.zeros([BLOCK_N], tl.float32)
        for first_row in range(0, count, BLOCK_M):
            row = first_row + local
            live = row < count
            queries = tl.load(q + batch * q_batch + head * q_head
                              + row.to(tl.int64)[:, None] * q_row + d[None, :] * q_dim,
                              mask=live[:, None] & (d < dim)[None, :], other=0.0)
            norm = tl.load(lse + (batch * kv_heads * group + head) * count + row, mask=live,
                           other=0.0)
            logits = tl.dot(queries, keys, input_precision="ieee") * scale
            seen = (key[None, :] <= (length - count + row)[:, None]) & live[:, None]
            weights = tl.where(seen, tl.exp2(logits - norm[:, None]), 0.0)
            sums += tl.sum(weights, 0)
            sheared = tl.where(inside, tl.gather(weights, column, 1), 0.0)
            distance = length - count + first_row + BLOCK_M - 1 - first_key - x
            tl.atomic_add(distances + out + distance, tl.sum(sheared, 0), sem="relaxed",
                          mask=(distance >= 0) & (distance < length))
        tl.store(columns + out + key, sums, mask=key < length)


@triton.jit
def strided_logsumexp(q, k, parts, q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim,
                      heads, group, q_len, length, dim, start, rows, blocks, scale,
                      STRIDE: tl.constexpr, PER: tl.constexpr, BLOCK_M: tl.constexpr,
                      BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """parts float32[B * Hq, rows, blocks]: log2-sum-exp2 of each strided row over one key block.

    Row i stands for the STRIDE queries of group start + i, column j for the STRIDE keys of group
    j, PER groups to a block. Grid: (tiles of key groups, tiles of rows, B * Hq). Tiles wholly
    ahead of their rows are not written.
    """
    first_row, first_key = tl.program_id(1) * BLOCK_M, tl.program_id(0) * BLOCK_N
    offset = length - q_len
    end = tl.minimum(offset + (start + first_row + BLOCK_M) * STRIDE, length)
    if first_key * STRIDE >= end:
        return
    batch = (tl.program_id(2) // heads).to(tl.int64)
    head = (tl.program_id(2) % heads).to(tl.int64)
    row, key = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    # The far part of an address is 64 bits wide and one for the tile; offsets inside it are 32.
    query_base = q + batch * q_batch + head * q_head \
        + ((start + first_row) * STRIDE).to(tl.int64) * q_row
    key_base = k + batch * k_batch + (head // group) * k_head \
        + (first_key * STRIDE).to(tl.int64) * k_row
    queries_left = q_len - (start + first_row) * STRIDE
    keys_left = length - first_key * STRIDE
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    pieces = tl.cdiv(dim, BLOCK_D)
    for step in range(STRIDE * pieces):
        r = step // pieces
        d = step % pieces * BLOCK_D + tl.arange(0, BLOCK_D)
        token = row * STRIDE + STRIDE - 1 - r
        queries = tl.load(query_base + token[:, None] * q_row + d[None, :] * q_dim,
                          mask=(token < queries_left)[:, None] & (d < dim)[None, :], other=0.0)
        other = key * STRIDE + r
        keys = tl.load(key_base + other[None, :] * k_row + d[:, None] * k_dim,
                       mask=(other < keys_left)[None, :] & (d < dim)[:, None], other=0.0)
        acc = tl.dot(queries, keys, acc, input_precision="ieee")
    final = offset + (start + first_row + row) * STRIDE + STRIDE - 1
    final = tl.minimum(final, length - 1)
    seen = ((first_key + key) * STRIDE)[None, :] <= final[:, None]
    logits = tl.reshape(tl.where(seen, acc * scale, -1e30), [BLOCK_M, BLOCK_N // PER, PER])
    top = tl.max(logits, 2)
    total = tl.sum(tl.exp2(logits - top[:, :, None]), 2)
    block = first_key // PER + tl.arange(0, BLOCK_N // PER)
    out = parts + (tl.program_id(2).to(tl.int64) * rows + first_row) * blocks
    tl.store(out + row[:, None] * blocks + block[None, :], top + tl.log2(total),
             mask=(first_row + row < rows)[:, None] & (block < blocks)[None, :])


@triton.jit
def strided_block_sums(parts, out, q_len, length, start, rows, blocks, out_rows,
                       STRIDE: tl.constexpr, PER: tl.constexpr, BLOCK_N: tl.constexpr):
    """out float32[B * Hq, Mb, Nb]: softmax of each strided row, summed over PER rows of a block.

    parts float32[B * Hq, rows, blocks] from `strided_logsumexp`. Grid: (blocks of rows, B * Hq).
    """
    row = tl.program_id(0) * PER + tl.arange(0, PER)
    group = start + row
    final = tl.minimum(length - q_len + (start + (tl.program_id(0) + 1) * PER) * STRIDE, length)
    seen = tl.cdiv(final, STRIDE * PER)  # blocks some row of this one sees
    base = parts + (tl.program_id(1).to(tl.int64) * rows + row)[:, None] * blocks
    column = tl.arange(0, BLOCK_N)
    top = tl.full([PER, BLOCK_N], -1e30, tl.float32)
    total = tl.zeros([PER, BLOCK_N], tl.float32)
    for first in range(0, seen, BLOCK_N):
        inside = first + column < seen
        part = tl.load(base + (first + column)[None, :], mask=inside[None, :], other=-1e30)
        new = tl.maximum(top, part)
        total = total * tl.exp2(top - new) + tl.exp2(part - new)
        top = new
    # Lanes that saw nothing hold 1 at -1e30, which vanishes beside any visible key.
    highest = tl.max(top, 1)
    norm = highest + tl.log2(tl.sum(total * tl.exp2(top - highest[:, None]), 1))
    live = group * STRIDE < q_len  # groups of padding alone count nothing
    to = out + (tl.program_id(1).to(tl.int64) * out_rows + start // PER
                + tl.program_id(0)) * blocks
    for first in range(0, seen, BLOCK_N):
        inside = first + column < seen
        part = tl.load(base + (first + column)[None, :], mask=inside[None, :], other=-1e30)
        weights = tl.where(live[:, None], tl.exp2(part - norm[:, None]), 0.0)
        tl.store(to + first + column, tl.sum(weights, 0), mask=inside)


@triton.jit
def sums_above(scores, cuts, out, n, SPAN: tl.constexpr, BLOCK: tl.constexpr, CUTS: tl.constexpr):
    """out float32[S, parts, CUTS]: for each cut, the sum of those of SPAN scores that reach it.

    scores float32[S, n], cuts float32[S, CUTS]. Grid: (parts, S).
    """
    segment = tl.program_id(1).to(tl.int64)
    cut = tl.load(cuts + segment * CUTS + tl.arange(0, CUTS))
    sums = tl.zeros([CUTS, BLOCK], tl.float32)
    for step in range(0, SPAN, BLOCK):
        place = tl.program_id(0) * SPAN + step + tl.arange(0, BLOCK)
        score = tl.load(scores + segment * n + place, mask=place < n, other=0.0)
        sums += tl.where(score[None, :] >= cut[:, None], score[None, :], 0.0)
    to = out + (segment * tl.num_programs(0) + tl.program_id(0)) * CUTS
    tl.store(to + tl.arange(0, CUTS), tl.sum(sums, 1))
