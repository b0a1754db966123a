"""A new pattern in twenty lines: write it, check it, count it, look at it, time it."""

from __future__ import annotations

import time

import torch

from maskdsl import LastQ, Shape, Where, Window, compile, dense, dense_attention


def main(length: int = 4096, path: str = "new_pattern.png") -> None:
    """A window, and beyond it every 16th block of 16 keys; the last queries see all."""
    summary = Where(lambda b, h, q, k: k // 16 % 16 == 0)
    attn = compile(Window(512) | summary | LastQ(64), backend="torch")
    q, k, v = (torch.randn(1, heads, length, 64) for heads in (4, 2, 2))
    start = time.perf_counter()
    out = attn(q, k, v)
    print(f"{length:,} tokens in {time.perf_counter() - start:.2f} s on the {attn.backend} backend")
    exact, _ = dense_attention(q, k, v, dense(attn.mask, Shape(length, length)))
    print(f"difference to dense attention: {float((out - exact).abs().max()):.1e}")
    told = attn.explain(length)
    print(f"{told.live_pairs:,} live pairs, {told.tile_speedup:.1f}x fewer tiles than dense causal")
    attn.mask.show(length, width=64)
    attn.mask.plot(length, path=path)
    print("picture:", path)


if __name__ == "__main__":
    main()
