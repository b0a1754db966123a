"""What does a layer's call cost the host inside a compiled model, and eagerly?

A chain of layers on tiny inputs, so that the GPU never falls behind: microseconds a call. Without a
GPU a rehearsal: no CUDA graph, few calls, and numbers that say nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import maskdsl
from benchmarks.host import host_us
from benchmarks.measure import MASKS, Report, device, make_inputs, mask_of

LAYERS = 16


def run(report: Report) -> None:
    """Eager, compiled, and compiled with CUDA graphs, beside SDPA in the same places."""
    q, k, v = make_inputs(64, 4, 4)
    calls = 100 if device() == "cuda" else 1
    attn = maskdsl.compile(mask_of(next(iter(MASKS.values()))))

    def chain(one: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(x: torch.Tensor) -> torch.Tensor:
            for _ in range(LAYERS):
                x = one(x, k, v)
            return x
        return call

    def dense(x: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, k, v, is_causal=True)

    def ours(x: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attn(x, k, v)

    with torch.no_grad():
        for name, one in (("maskdsl", ours), ("sdpa", dense)):
            for mode, options in (("eager", None), ("compiled", {}),
                                  ("compiled, CUDA graph", {"mode": "reduce-overhead"})):
                if report.is_late(f"{name}, {mode}") or ("graph" in mode and device() == "cpu"):
                    continue
                call: Any = chain(one)
                if options is not None:
                    torch._dynamo.reset()
                    call = torch.compile(call, fullgraph=True, **options)
                for _ in range(3):
                    call(q)
                report.add(kernel=name, mode=mode,
                           microseconds_a_layer=host_us(lambda c=call: c(q), calls) / LAYERS)
