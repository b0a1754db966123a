"""Plain attention of a few query rows to a cache: what a decoding step of the stock model does."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def attend_dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
                 scaling: float | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Plain attention to the cache for a few query rows; [B, Lq, Hq, D]."""
    if softcap is None and sinks is None:
        grouped = query.shape[1] != key.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)
        return out.transpose(1, 2).contiguous()
    b, heads, rows, dim = query.shape
    grouped_q = query.view(b, key.shape[1], -1, rows, dim)
    scores = (grouped_q @ key.unsqueeze(2).transpose(-1, -2)).float() * (
        dim ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(2), torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.float().view(1, key.shape[1], -1, 1, 1).expand(b, -1, -1, rows, 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., :key.shape[2]].to(value.dtype)
    out = (weights @ value.unsqueeze(2)).view(b, heads, rows, -1)
    return out.transpose(1, 2).contiguous()
