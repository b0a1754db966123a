"""One triangle layer against one dense layer: the mask TriangleMix puts into half its layers."""

from __future__ import annotations

import maskdsl
from benchmarks.measure import MASKS, Report, make_inputs, mask_of, tera_flops, time_ms
from maskdsl import Causal, Full, Shape
from maskdsl.tiles import count_pairs


def run(report: Report) -> None:
    """Sink(8) | Window(512) | LastQ(128) at 32K and 128K beside dense FlashAttention 3."""
    from fa3_fwd_interface import flash_attn_func

    name, sizes = next(iter(MASKS.items()))
    mask = mask_of(sizes)
    for length in (32768, 131072):
        q, k, v = make_inputs(length)
        shape = Shape(length, length)
        ideal = count_pairs(Causal(), shape) / count_pairs(Causal() & mask, shape)
        blhd = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
        dense = time_ms(flash_attn_func, *blhd, causal=True)
        report.add(mask="dense causal", length=length, kernel="FlashAttention 3", ms=dense,
                   tflops=tera_flops(Full(), length, dense))
        ours = time_ms(maskdsl.compile(mask), q, k, v)
        report.add(mask=name, length=length, kernel="maskdsl", ms=ours,
                   tflops=tera_flops(mask, length, ours), faster_than_dense=dense / ours,
                   ratio_of_pairs=ideal)
