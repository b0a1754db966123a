"""What does a warm call cost on the host, beyond Triton's own launch?"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import maskdsl
from benchmarks.measure import MASKS, Report, make_inputs, mask_of


def host_us(call: Callable[[], Any], calls: int = 300, rounds: int = 15) -> float:
    """Median over rounds of the host microseconds a call takes; the GPU never falls behind."""
    times = []
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
        wait()
    return sorted(times)[rounds // 2]


def run(report: Report) -> None:
    """attn(q, k, v) on a tiny call, beside the bare launch of the same kernel."""
    q, k, v = make_inputs(64, 1, 1)
    attn = maskdsl.compile(mask_of(next(iter(MASKS.values()))))
    attn(q, k, v)
    forward: Any = attn._forward
    (variant,) = forward.variants.values()
    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    jit = variant.forward

    class Recorder:
        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            return lambda *a, **kw: seen.append((grid, a, kw))

    object.__setattr__(variant, "forward", Recorder())
    attn._ready.clear()
    attn(q, k, v)
    object.__setattr__(variant, "forward", jit)
    attn._ready.clear()
    attn(q, k, v)
    grid, arguments, options = seen[0]
    whole = host_us(lambda: attn(q, k, v))
    launch = host_us(lambda: jit[grid](*arguments, **options))
    report.add(what="attn(q, k, v)", microseconds=whole)
    report.add(what="Triton's launch of the same kernel", microseconds=launch)
    report.add(what="difference", microseconds=whole - launch)
