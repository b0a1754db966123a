"""Every element of a gradient held to what rounding allows, given the kernels' own output and lse.

FlashAttention's rule compares largest errors: one wrong pair in a row of small gradients passes it.
Here the gradients are made again in float64 from what the kernels read (q, k, v, the output, the
lse), so all that is left is the rounding inside the backward kernels.
"""

from __future__ import annotations

import torch
from oracle import Case

Tensor = torch.Tensor
TERMS = 32  # float32 roundings in a row that an element may have seen; at most 15 were needed


def check_rounding(case: Case, tensors: tuple[Tensor, ...], kept: tuple[Tensor, Tensor],
                   found: tuple[Tensor, ...], live: Tensor,
                   weights: tuple[Tensor, Tensor | None]) -> None:
    """dq, dk, dv of a case without score modifiers.

    tensors  q, k, v; kept: output and lse of the kernels; live: bool, broadcast to the scores
    weights  the gradients of the output and of the lse
    """
    share = case.heads // case.kv_heads
    q, k, v = (t.double() for t in tensors)
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scale = case.dim ** -0.5 if case.scale is None else case.scale
    wide, narrow = torch.finfo(torch.float32).eps, torch.finfo(case.dtype).eps
    least = torch.finfo(case.dtype).smallest_normal * narrow  # where float16 rounds to steps
    out, lse = (t.detach().double() for t in kept)
    dead = lse == -torch.inf
    lse, upstream = torch.where(dead, 0.0, lse), weights[0].double()
    more = torch.zeros_like(lse) if weights[1] is None else weights[1].double()
    more = torch.where(dead, 0.0, more)
    delta = torch.where(dead, 0.0, (upstream * out).sum(-1) - more)[..., None]
    size = torch.where(dead, 0.0, (upstream * out).abs().sum(-1) + more.abs())[..., None]
    scores = torch.where(live, q @ k.mT * scale - lse[..., None], -torch.inf)
    chance = torch.exp(scores)
    slope = chance * (upstream @ v.mT - delta)
    # of a probability: the score's rounding and the lse's; of a slope: also those of its two terms
    loose = TERMS * wide * chance * (1 + q.abs() @ k.abs().mT * scale + lse.abs()[..., None])
    off = loose * (upstream @ v.mT - delta).abs() + narrow * slope.abs() + least * live
    off += TERMS * wide * chance * (upstream.abs() @ v.abs().mT + size)
    rounded = loose + narrow * chance + least * live

    def fold(t: Tensor) -> Tensor:
        return t.unflatten(1, (case.kv_heads, share)).sum(2)

    right = (slope @ k * scale, fold(slope.mT @ q) * scale, fold(chance.mT @ upstream))
    room = (off @ k.abs() * scale, fold(off.mT @ q.abs()) * scale,
            fold(rounded.mT @ upstream.abs()))
    sums = (slope.abs() @ k.abs() * scale, fold(slope.abs().mT @ q.abs()) * scale,
            fold(chance.mT @ upstream.abs()))
    for name, ours, want, off, total in zip(("dq", "dk", "dv"), found, right, room, sums,
                                            strict=True):
        allowed = off + 2 * TERMS * wide * total + narrow * want.abs() + least
        assert ((ours.double() - want).abs() <= allowed).all(), (name, case)
