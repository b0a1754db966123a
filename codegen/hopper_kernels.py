# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# ruff: noqa: PLR0913, PLR0917
"""The kernel that joins the key ranges of cut items. Plain Triton, the same for every mask."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def combine(part_ptr, part_lse_ptr, out_ptr, lse_ptr, stride_b, stride_h, stride_l, heads, rows,
            first_row, q_len, splits, DIM: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr,
            BLOCK: tl.constexpr, WITH_LSE: tl.constexpr):
    """out = sum_j w_j part_j / sum_j w_j with w_j = exp(lse_j), for BLOCK rows of one head.

    parts are float32 [splits, B, H, rows, STRIDE], their lse [splits, B, H, rows] in natural
    logarithms; row 0 of the parts is row first_row of the output.
    """
    head, batch = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    inside = (row < rows) & (first_row + row < q_len)
    step = tl.num_programs(2) * heads * rows
    place = (batch * heads + head) * rows + row
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    for j in range(splits):
        peak = tl.maximum(peak, tl.load(part_lse_ptr + j * step + place, mask=inside,
                                        other=float("-inf")))
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    for j in range(splits):
        lse = tl.load(part_lse_ptr + j * step + place, mask=inside, other=float("-inf"))
        weight = tl.exp(lse - shift)
        total += weight
        acc += weight[:, None] * tl.load(
            part_ptr + (j * step + place).to(tl.int64)[:, None] * STRIDE + column[None, :],
            mask=inside[:, None] & (column[None, :] < DIM), other=0.0)
    dead = total == 0.0
    acc = acc / tl.where(dead, 1.0, total)[:, None]
    base = out_ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    row = first_row + row
    tl.store(base + row.to(tl.int64)[:, None] * stride_l + column[None, :],
             acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (column[None, :] < DIM))
    if WITH_LSE:
        lse = tl.where(dead, float("-inf"), shift + tl.log(tl.where(dead, 1.0, total)))
        tl.store(lse_ptr + (batch.to(tl.int64) * heads + head) * q_len + row, lse, mask=inside)
