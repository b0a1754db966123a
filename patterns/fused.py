"""Launches the fused kernels of the estimates. Triton is imported at the first launch."""

from __future__ import annotations

import torch

LOG2_E = 1.4426950408889634
TILE = 64  # rows and keys of a tile of pass 2, and keys of pass 1
ROWS = 128  # rows of a tile of pass 1; the heads of a group are packed into it
WIDE = 256  # bytes of a row of q above which both tiles and a second stage overfill shared memory
SPLITS = 64  # parts of the keys in pass 1: with 8 KV heads and 2 tiles each, 1,024 programs


def fused_scores(rows: torch.Tensor, k: torch.Tensor,
                 scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`vertical_slash_scores` in two passes over K that keep every probability in registers.

    rows float[B, Hq, n, D]: the last n queries; k float[B, Hkv, Lk, D]; n <= Lk.
    Returns float32[B, Hq, Lk] twice: sums of the columns, sums at the distances.

    Pass 1 gives the log-sum-exp of each row, over parts of the keys that are then combined.
    Pass 2 computes the probabilities of a tile again and adds them up along columns, which is a
    plain store, and along diagonals, which is one float32 atomic for each diagonal of a tile.
    """
    from maskdsl.patterns import fused_kernels as kernels

    batch, heads, count, dim = rows.shape
    kv_heads, length = k.shape[1], k.shape[2]
    numbers = (*rows.stride(), *k.stride(), heads // kv_heads, kv_heads, count, length, dim,
               scale * LOG2_E)
    block_d = max(16, 1 << (dim - 1).bit_length())
    wide = block_d * rows.element_size() > WIDE
    options = {"BLOCK_N": TILE, "BLOCK_D": block_d, "num_stages": 1 if wide else 3}
    tiles = -(-length // TILE)
    splits = min(SPLITS, tiles)
    packed = heads // kv_heads * count
    parts = rows.new_empty(batch, kv_heads, splits, packed, dtype=torch.float32)
    block_m = TILE if wide else ROWS
    grid = (-(-packed // block_m), splits, batch * kv_heads)
    kernels.row_lse[grid](rows, k, parts, *numbers, BLOCK_M=block_m, num_warps=block_m // 16,
                          **options)
    lse = (parts * (1 / LOG2_E)).logsumexp(2) * LOG2_E  # base 2, [B, Hkv, G * n]
    columns = rows.new_empty(batch, heads, length, dtype=torch.float32)
    distances = rows.new_zeros(batch, heads, length, dtype=torch.float32)
    kernels.column_and_diagonal_sums[tiles, batch * kv_heads](
        rows, k, lse, columns, distances, *numbers, BLOCK_M=TILE, num_warps=4,
        **options)
    return columns, distances
