"""Compile a mask, run it on this machine's device, check it, explain it, time it, draw it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

import maskdsl
from maskdsl import Causal, LastQ, Shape, Sink, Window, dense, dense_attention, save_picture

MASK = Sink(4) | Window(2048) | LastQ(64)


def seconds(call: Callable[[], object], device: str) -> float:
    """Median wall-clock seconds of a few calls, after one to warm up."""
    times = []
    repeats = 5 if device == "cuda" else 3
    for i in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if i:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def check(device: str, dtype: torch.dtype) -> float:
    """Largest difference to dense attention in float64, 3000 tokens, grouped heads."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 3000, 64, device=device, dtype=dtype) for h in (4, 2, 2))
    live = dense(Causal() & MASK, Shape(3000, 3000), device=device)
    exact, _ = dense_attention(q.double(), k.double(), v.double(), live)
    return float((maskdsl.compile(MASK)(q, k, v).double() - exact).abs().max())


def main(length: int | None = None) -> None:
    """The whole tour; `length` in tokens, by default 32K on a GPU and 16K on a CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    length = length or (32768 if device == "cuda" else 16384)

    attn = maskdsl.compile(MASK)
    error = check(device, dtype)
    print(f"difference to dense attention: {error:.1e}")
    if error > (2e-2 if dtype == torch.bfloat16 else 1e-5):
        raise SystemExit("the result is wrong")

    print(attn.explain(length, heads=4, head_dim=64), "\n")
    q, k, v = (torch.randn(1, h, length, 64, device=device, dtype=dtype) for h in (4, 2, 2))
    sparse = seconds(lambda: attn(q, k, v), device)
    full = seconds(lambda: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True), device)
    print(f"{length:,} tokens on {device} ({attn.backend} backend): {sparse * 1e3:.1f} ms; dense "
          f"causal attention in torch: {full * 1e3:.1f} ms, {full / sparse:.1f}x as long")
    print("picture:", save_picture(Causal() & (Sink(4) | Window(24) | LastQ(8)), "mask.png"))


if __name__ == "__main__":
    main()
