"""How fast is dense causal attention through the same compiler, beside FlashAttention 3?"""

from __future__ import annotations

import torch

import maskdsl
from benchmarks.measure import Report, make_inputs, tera_flops, time_ms
from maskdsl import Full


def run(report: Report) -> None:
    """Dense causal at 16K and 32K."""
    from fa3_fwd_interface import flash_attn_func

    for length in (16384, 32768):
        q, k, v = make_inputs(length)
        attn = maskdsl.compile(Full())
        ours = time_ms(attn, q, k, v)
        report.add(mask="dense causal", length=length, kernel="maskdsl", ms=ours,
                   tflops=tera_flops(Full(), length, ours))
        blhd = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
        result = flash_attn_func(*blhd, causal=True)
        result = result[0] if isinstance(result, tuple) else result
        gap = (result.transpose(1, 2) - attn(q, k, v)).abs().max().item()
        assert gap < 0.05, f"FlashAttention 3 and maskdsl differ by {gap}"
        theirs = time_ms(flash_attn_func, *blhd, causal=True)
        report.add(mask="dense causal", length=length, kernel="FlashAttention 3", ms=theirs,
                   tflops=tera_flops(Full(), length, theirs), slower=theirs / ours)
        sdpa = time_ms(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True,
                       enable_gqa=True)
        report.add(mask="dense causal", length=length, kernel="SDPA (torch's choice)", ms=sdpa,
                   tflops=tera_flops(Full(), length, sdpa), slower=sdpa / ours)
