"""What estimating dynamic sparsity costs at 128K, beside the attention it steers and dense."""

from __future__ import annotations

import maskdsl
from benchmarks.measure import Report, make_inputs, time_ms
from maskdsl import Blocks, Full, VerticalSlash
from maskdsl.patterns import block_topk, flex_prefill, vertical_slash, xattention

LENGTH = 131072


def run(report: Report) -> None:
    """Each estimator on random inputs, 32 query heads over 8 key heads of 128."""
    q, k, v = make_inputs(LENGTH)
    dense = time_ms(maskdsl.compile(Full()), q, k, v)
    report.add(what="dense causal attention", ms=dense)
    for sizes in ((1000, 6096), (512, 2048)):
        for shared in (False, True):
            def estimate(shared: bool = shared, sizes: tuple[int, int] = sizes) -> object:
                return vertical_slash(q, k, *sizes, per_kv_head=shared)

            name = f"vertical_slash{sizes}{', per key/value head' if shared else ''}"
            report.add(what=f"estimate {name}", ms=time_ms(estimate))
            attn = maskdsl.compile(VerticalSlash("vs"))
            report.add(what=f"attention {name}", ms=time_ms(attn, q, k, v, vs=estimate()))
    report.add(what="estimate block_topk(100), blocks of 64", ms=time_ms(block_topk, q, k, 100))
    data = block_topk(q, k, 100)
    report.add(what="attention block_topk(100), blocks of 64",
               ms=time_ms(maskdsl.compile(Blocks("b", 64, 64)), q, k, v, b=data))
    report.add(what="estimate flex_prefill()", ms=time_ms(flex_prefill, q, k))
    report.add(what="estimate xattention(stride=16)", ms=time_ms(xattention, q, k, stride=16))
