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
