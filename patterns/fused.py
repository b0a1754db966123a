"""Launches the fused kernels of the estimates. Triton is imported at the first launch."""

from __future__ import annotations

import torch

LOG2_E = 1.4426950408889634
TILE = 64  # rows and keys of a tile of pass 2, and keys of pass 1
ROWS = 128  # rows of a tile of pass 1; the heads of a group are packed into it
WIDE = 256  # bytes of a row of q above which both tiles and a second stage overfill shared memory
PARTS = 1 << 26  # numbers of a temporary of the antidiagonal estimate: 256 MiB of float32
SPAN = 8192  # scores a program of `sums_above` adds up
CUTS, PASSES = 16, 8  # 17 ** 8 > 2 ** 30 + 1, the range of bits that is searched
TWO = 0x40000000  # the bits of 2.0
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


def fused_antidiagonal(q: torch.Tensor, k: torch.Tensor, stride: int, block: int,
                       scale: float) -> torch.Tensor:
    """`antidiagonal_scores` with one product for each strided tile, kept in registers.

    q float[B, Hq, Lq, D], k float[B, Hkv, Lk, D]; see `can_fuse_antidiagonal` for the sizes.
    Returns float32[B, Hq, Mb, Nb]. A tile leaves one number a row and key block, the log-sum-exp
    of the row over the block, from which a second kernel makes the softmax and the block sums.
    """
    from maskdsl.patterns import fused_kernels as kernels

    batch, heads, q_len, dim = q.shape
    length, per = k.shape[2], block // stride
    rows, blocks = -(-q_len // block), -(-length // block)
    out = q.new_zeros(batch, heads, rows, blocks, dtype=torch.float32)
    step = min(rows, max(1, PARTS // (batch * heads * blocks * per)))
    parts = q.new_empty(batch * heads, step * per, blocks, dtype=torch.float32)
    block_d = min(64, max(16, 1 << (dim - 1).bit_length()))
    numbers = (*q.stride(), *k.stride(), heads, heads // k.shape[1], q_len, length, dim)
    sizes = {"STRIDE": stride, "PER": per}
    tiles = -(-blocks * per // ROWS)
    wide = q.element_size() > 2
    for start in range(0, rows * per, step * per):
        grid = (tiles, -(-step * per // ROWS), batch * heads)
        kernels.strided_logsumexp[grid](q, k, parts, *numbers, start, step * per, blocks,
                                        scale / stride * LOG2_E, **sizes, BLOCK_M=ROWS,
                                        BLOCK_N=ROWS, BLOCK_D=block_d, num_warps=8,
                                        num_stages=2 if wide else 4)
        some = min(step, rows - start // per)
        kernels.strided_block_sums[some, batch * heads](
            parts, out, q_len, length, start, step * per, blocks, rows, **sizes, BLOCK_N=TILE)
    return out


def can_fuse_antidiagonal(stride: int, block: int) -> bool:
    """Whether the groups of a block are a power of two that divides a tile."""
    return ROWS % (block // stride) == 0


def fused_prefix_cut(scores: torch.Tensor, target: float) -> torch.Tensor:
    """`prefix_cut`, sixteen cuts at a time: eight passes over the scores in place of thirty-one.

    scores float32[..., n], 0 <= score < 2. Returns float32[..., 1].
    """
    from maskdsl.patterns import fused_kernels as kernels

    flat = scores.flatten(0, -2).contiguous()
    segments, n = flat.shape
    parts = -(-n // SPAN)
    low = torch.full((segments, 1), -1, dtype=torch.int64, device=flat.device)
    high = torch.full_like(low, TWO)
    share = torch.arange(1, CUTS + 1, device=flat.device)
    for _ in range(PASSES):
        middle = low + ((high - low) * share + CUTS) // (CUTS + 1)  # rounded up: low < it <= high
        cuts = middle.to(torch.int32).view(torch.float32)
        sums = torch.empty(segments, parts, CUTS, dtype=torch.float32, device=flat.device)
        kernels.sums_above[parts, segments](flat, cuts, sums, n, SPAN=SPAN, BLOCK=512, CUTS=CUTS)
        fits = sums.sum(1) <= target
        high = torch.minimum(high, torch.where(fits, middle, TWO).amin(-1, keepdim=True))
        low = torch.maximum(low, torch.where(fits, -1, middle).amax(-1, keepdim=True))
    return high.to(torch.int32).view(torch.float32).view(*scores.shape[:-1], 1)
