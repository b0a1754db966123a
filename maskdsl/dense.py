"""The oracle: a mask as a dense bool tensor, and attention under it in plain PyTorch.

Everything else in this package is tested against these few lines.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from maskdsl.binding import bind_slots
from maskdsl.expr import Mask
from maskdsl.shape import Shape, Site


def dense(mask: Mask, shape: Shape, batch: int = 1, heads: int = 1,
          device: torch.device | str | None = None,
          slots: Mapping[str, object] | None = None) -> torch.Tensor:
    """The mask as bool[batch, heads, q_len, kv_len]; memory grows with q_len * kv_len.

    batch, heads  only masks that ask for them (a `Where`, a slot, `PerHead`) differ along these
    slots         the call-time data of every slot of the mask, by name
    """
    if not shape.q_len or not shape.kv_len:
        return torch.zeros(batch, heads, shape.q_len, shape.kv_len, dtype=torch.bool, device=device)
    p = torch.arange(shape.q_len, device=device).view(1, 1, -1, 1) + shape.q_offset
    k = torch.arange(shape.kv_len, device=device).view(1, 1, 1, -1)
    site = Site.of(shape, torch.arange(batch, device=device).view(-1, 1, 1, 1),
                   torch.arange(heads, device=device).view(1, -1, 1, 1), heads,
                   bind_slots(mask, slots or {}, shape))
    live = mask.contains(p, k, site)
    if not isinstance(live, torch.Tensor):
        live = torch.tensor(bool(live), device=device)
    return live.to(torch.bool).broadcast_to(batch, heads, shape.q_len, shape.kv_len)


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, live: torch.Tensor,
                    scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked softmax attention the plain way, in the dtype of q.

    q     [B, Hq, Lq, D]
    k, v  [B, Hkv, Lk, D], [B, Hkv, Lk, Dv]; Hq a whole multiple of Hkv
    live  bool, broadcastable to [B, Hq, Lq, Lk]

    Returns output [B, Hq, Lq, Dv] and lse float [B, Hq, Lq] (natural logarithm); a row without a
    live key gives 0 and -inf.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~live, float("-inf"))
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.sum(-1) - float("inf")
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
    return weights.to(v.dtype) @ v, lse
