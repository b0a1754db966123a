"""How fast is the forward pass of a triangle mask, beside FlexAttention on the same mask?"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import maskdsl
from benchmarks.measure import MASKS, Report, make_inputs, mask_of, tera_flops, time_ms

# None is FlexAttention's own choice; the others are those worth trying on an H100.
SETTINGS: list[dict[str, int] | None] = [
    None,
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 4, "num_stages": 4},
]


def flex_mask(sizes: tuple[int, int, int], length: int) -> Callable[..., Any]:
    """The same mask as a FlexAttention mask_mod."""
    sink, window, last = sizes

    def triangle(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & ((k < sink) | (q - k < window) | (q >= length - last))

    return triangle


def make_block_mask(sizes: tuple[int, int, int], length: int) -> BlockMask:
    """FlexAttention's tables; compiled where the eager way would not fit into memory."""
    return create_block_mask(flex_mask(sizes, length), None, None, length, length, device="cuda",
                             _compile=length > 32768)


def run(report: Report) -> None:
    """Three masks at 32K and 128K: we, FlexAttention by default, FlexAttention at its best."""
    best: dict[str, dict[str, int] | None] = {}
    for length in (32768, 131072):
        for name, sizes in MASKS.items():
            q, k, v = make_inputs(length)
            mask = mask_of(sizes)
            attn = maskdsl.compile(mask)
            ours = time_ms(attn, q, k, v)
            expected = attn(q, k, v)
            report.add(mask=name, length=length, kernel="maskdsl", ms=ours,
                       tflops=tera_flops(mask, length, ours))
            start = time.perf_counter()
            tables = make_block_mask(sizes, length)
            torch.cuda.synchronize()
            first = time.perf_counter() - start
            settings = SETTINGS if name not in best else [None, best[name]]
            times: dict[int, float] = {}
            for i, options in enumerate(settings):
                torch._dynamo.reset()
                flex = torch.compile(flex_attention, dynamic=False)
                more = {"block_mask": tables, "enable_gqa": True, "kernel_options": options}
                try:
                    with torch.no_grad():
                        gap = (flex(q, k, v, **more) - expected).abs().max().item()
                        assert gap < 0.05, f"FlexAttention and maskdsl differ by {gap}"
                        times[i] = time_ms(flex, q, k, v, **more)
                except (RuntimeError, ValueError) as error:
                    print(f"FlexAttention {options}: {type(error).__name__}", flush=True)
            for label, i in (("FlexAttention default", 0),
                             ("FlexAttention best", min(times, key=times.__getitem__))):
                report.add(mask=name, length=length, kernel=label, ms=times[i],
                           tflops=tera_flops(mask, length, times[i]), slower=times[i] / ours,
                           seconds_for_its_mask=first, settings=str(settings[i] or ""))
            best.setdefault(name, settings[min(times, key=times.__getitem__)])
