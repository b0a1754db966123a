# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# ruff: noqa: PLR0913, PLR0917
"""Small kernels before and after the Hopper backward. Plain Triton, the same for every mask."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_products(out_ptr, grad_ptr, lse_ptr, lse_grad_ptr, delta_ptr, o_stride_b, o_stride_h,
                 o_stride_l, g_stride_b, g_stride_h, g_stride_l, heads, q_len, DIM: tl.constexpr,
                 BLOCK: tl.constexpr, WITH_LSE: tl.constexpr):
    """delta = rowsum(dO * O) - dLSE for BLOCK rows of one head; 0 where a row has no live key.

    out, grad [B, H, Lq, DIM] with contiguous last dimension, strides in elements; lse, lse_grad and
    delta float32 [B, H, Lq]
    """
    head, batch = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, DIM)
    inside = row < q_len
    at = row.to(tl.int64)[:, None]
    o_base = out_ptr + batch.to(tl.int64) * o_stride_b + head.to(tl.int64) * o_stride_h
    g_base = grad_ptr + batch.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    out = tl.load(o_base + at * o_stride_l + column[None, :], mask=inside[:, None], other=0.0)
    grad = tl.load(g_base + at * g_stride_l + column[None, :], mask=inside[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    place = (batch.to(tl.int64) * heads + head) * q_len + row
    if WITH_LSE:
        delta -= tl.load(lse_grad_ptr + place, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + place, mask=inside, other=0.0)
    tl.store(delta_ptr + place, tl.where(lse == float("-inf"), 0.0, delta), mask=inside)


@triton.jit
def sum_parts(part_ptr, out_ptr, stride_b, stride_h, stride_l, heads, rows, first_row, length,
              splits, scale, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """out = scale * sum of the parts of cut items, in order, for BLOCK rows of one head.

    parts are float32 [splits, B, H, rows, DIM]; row 0 of the parts is row first_row of the output
    """
    head, batch = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, DIM)
    inside = ((row < rows) & (first_row + row < length))[:, None]
    step = tl.num_programs(2) * heads * rows
    place = (batch * heads + head) * rows + row
    acc = tl.zeros([BLOCK, DIM], tl.float32)
    for j in range(splits):
        acc += tl.load(part_ptr + (j * step + place).to(tl.int64)[:, None] * DIM + column[None, :],
                       mask=inside, other=0.0)
    base = out_ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    tl.store(base + (first_row + row).to(tl.int64)[:, None] * stride_l + column[None, :],
             (acc * scale).to(out_ptr.dtype.element_ty), mask=inside)
