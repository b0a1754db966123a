"""A mask for every head, as in DuoAttention (arXiv 2410.10819): retrieval and streaming heads.

`study` says which heads can do with a sink and a window; those get one, the others stay dense.
"""

from __future__ import annotations

import torch

from maskdsl import Causal, PerHead, Shape, Sink, Window, compile, dense, dense_attention, study

STREAMING = Sink(4) | Window(128)
KEPT = 0.9  # attention mass a head must keep to become a streaming head


def make_heads(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eight heads: the even ones look at neighbours, the odd ones anywhere."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, length, 32, generator=g) for _ in range(3))
    place = torch.arange(length)[:, None] / 32 * torch.logspace(0, -2, 16)
    near = 3 * torch.cat([place.cos(), place.sin()], -1)  # q . k falls with the distance
    q[:, ::2], k[:, ::2] = q[:, ::2] / 4 + near, k[:, ::2] / 4 + near
    return q, k, v


def main(length: int = 2048) -> PerHead:
    """Choose, compile, check, draw; returns the mask."""
    q, k, v = make_heads(length)
    found = study([(q, k, v)], {"streaming": STREAMING}, rows=512)
    kept = found.mass[0, 0]
    print("mass kept by head:", [round(float(x), 2) for x in kept])
    mask = PerHead([STREAMING if mass >= KEPT else Causal() for mass in kept])
    attn = compile(mask, backend="torch")
    out = attn(q, k, v)
    live = dense(attn.mask, Shape(length, length), heads=8)
    exact, _ = dense_attention(q, k, v, live)
    print(f"difference to dense under the same mask: {float((out - exact).abs().max()):.1e}")
    full, _ = dense_attention(q, k, v, dense(Causal(), Shape(length, length)))
    print(f"relative difference to full attention: {float((out - full).norm() / full.norm()):.3f}")
    share = float(live.sum()) / (8 * length * (length + 1) / 2)
    print(f"{100 * share:.0f} % of the causal pairs are computed")
    attn.mask.plot(length, path="heads.png")
    print("picture: heads.png")
    return mask


if __name__ == "__main__":
    main()
