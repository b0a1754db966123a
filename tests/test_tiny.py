"""The ten-second smoke test: language, compiler, one run on this machine's device."""

from __future__ import annotations

import torch

from maskdsl import Causal, LastQ, Shape, Sink, Window, compile, dense, dense_attention


def test_tiny() -> None:
    mask = Sink(2) | Window(9) | LastQ(3)
    attn = compile(mask)
    device, dtype = ("cuda", torch.float16) if attn.backend == "triton" else ("cpu", torch.float32)
    q, k, v = (torch.randn(1, h, 50, 16, device=device, dtype=dtype) for h in (4, 2, 2))
    live = dense(Causal() & mask, Shape(50, 50), device=device)
    exact, exact_lse = dense_attention(q.double(), k.double(), v.double(), live)
    out, lse = attn(q, k, v, return_lse=True)
    assert (out - exact).abs().max() < 5e-3
    assert (lse - exact_lse).abs().max() < 1e-4
    assert attn.explain(50).live_pairs == int(live.sum())
    assert "def forward(" in attn.source
