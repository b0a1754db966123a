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
from maskdsl import Causal

LAYERS = 16


def run(report: Report) -> None:
    """Eager, compiled, and compiled with CUDA graphs: `attn(q, k, v)` and the drop-in
    `flex_attention`, beside FlexAttention (compiled only) and SDPA in the same places."""
    q, k, v = make_inputs(64, 4, 4)
    calls = 100 if device() == "cuda" else 1
    with torch.no_grad():
        for name, one in kernels().items():
            for mode, options in MODES.items():
                if report.is_late(f"{name}, {mode}") or is_left_out(name, mode):
                    continue
                call: Any = chain(one, k, v)
                if options is not None:
                    torch._dynamo.reset()
                    call = torch.compile(call, fullgraph=True, **options)
                for _ in range(3):
                    call(q)
                report.add(kernel=name, mode=mode,
                           microseconds_a_layer=host_us(lambda c=call: c(q), calls) / LAYERS)


MODES: dict[str, dict[str, Any] | None] = {
    "eager": None, "compiled": {}, "compiled, CUDA graph": {"mode": "reduce-overhead"}}


def is_left_out(name: str, mode: str) -> bool:
    """There is no CUDA graph without CUDA, and FlexAttention is no kernel unless compiled."""
    return ("graph" in mode and device() == "cpu") or (name == "FlexAttention" and mode == "eager")


def kernels() -> dict[str, Callable[..., torch.Tensor]]:
    """What is measured, as functions of (q, k, v)."""
    from torch.nn.attention.flex_attention import flex_attention

    sparse = mask_of(next(iter(MASKS.values())))
    attn, mask = maskdsl.compile(sparse), Causal() & sparse
    block_mask = mask.block_mask(64, device=device())
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return {
        "maskdsl": attn,
        "maskdsl.flex_attention": lambda q, k, v: maskdsl.flex_attention(q, k, v, None, mask),
        "FlexAttention": lambda q, k, v: flex_attention(q, k, v, None, block_mask),
        "sdpa": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    }


def chain(one: Callable[..., torch.Tensor], k: torch.Tensor,
          v: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A model of so many layers and nothing else."""
    def call(x: torch.Tensor) -> torch.Tensor:
        for _ in range(LAYERS):
            x = one(x, k, v)
        return x
    return call
