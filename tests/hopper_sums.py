"""Inputs whose scores lie far apart, for kernels that leave out maxima."""

from __future__ import annotations

import torch

# what is added to all scores, how much the last key's rise above the first's (both in nats), and
# what random scores are multiplied by
FAR_APART = [(0.0, 0.0, 1.0), (0.0, 0.0, 30.0), (-300.0, 0.0, 1.0), (300.0, 0.0, 30.0),
             (0.0, -400.0, 1.0), (0.0, 90.0, 1.0), (-300.0, 90.0, 30.0), (300.0, -400.0, 30.0)]


def spread(q: torch.Tensor, k: torch.Tensor, shift: float, rise: float,
           times: float) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k [B, H, L, D] with the scores of `FAR_APART`; for the default scale."""
    q, k = q * times, k.clone()
    q[..., 0] = 16
    added = shift + rise * torch.arange(k.shape[2], device=k.device) / k.shape[2]
    k[..., 0] = (added * (q.shape[3]**0.5 / 16)).to(k.dtype)
    return q, k
