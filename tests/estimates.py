"""What the tests of the estimates share: inputs, and attention of one head in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Tensor = torch.Tensor
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# batch, query heads, KV heads, queries, keys, head dimension
Sizes = tuple[int, int, int, int, int, int]
SIZES: list[Sizes] = [
    (1, 1, 1, 128, 128, 16),
    (2, 4, 2, 300, 300, 24),  # ragged, grouped, an odd head dimension
    (1, 3, 1, 101, 367, 40),  # a chunk that starts inside a block
    (1, 2, 2, 128, 384, 16),  # a chunk that starts at a block
    (1, 2, 1, 5, 203, 16),
    (1, 1, 1, 1, 1, 16),
]


def make(sizes: Sizes, sharp: float = 2.0, dtype: torch.dtype = torch.float32,
         seed: int = 0) -> tuple[Tensor, Tensor]:
    """q and k whose softmax has a few large entries."""
    batch, heads, kv_heads, q_len, k_len, dim = sizes
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, q_len, dim, generator=generator)
    k = torch.randn(batch, kv_heads, k_len, dim, generator=generator) * sharp
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype)


def each_head(q: Tensor, k: Tensor, one: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`one` of every query head and its KV head, in double precision on the CPU."""
    group = q.shape[1] // k.shape[1]
    q, k = q.double().cpu(), k.double().cpu()
    return torch.stack([torch.stack([one(q[b, h], k[b, h // group]) for h in range(q.shape[1])])
                        for b in range(q.shape[0])])


def causal_weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[Lq, Lk] of one head: the last query lines up with the last key."""
    logits = scale * q @ k.T
    position = torch.arange(len(q))[:, None] + len(k) - len(q)
    return logits.masked_fill(torch.arange(len(k)) > position, -math.inf).softmax(-1)


def sets(index: Tensor) -> list[set[int]]:
    """The lists of [..., n] as sets; each entry is there once."""
    lists = index.flatten(0, -2).tolist()
    assert all(len(set(entries)) == len(entries) for entries in lists)
    return [set(entries) for entries in lists]


def paper_scores(q: Tensor, k: Tensor, last: int, scale: float) -> Tensor:
    """[2, Lk] of one head: column sums, and sums at each distance, of the last rows."""
    weights = causal_weights(q, k, scale)[-last:]
    sums = torch.zeros(2, len(k), dtype=torch.float64)
    for r, row in enumerate(weights):
        position = len(k) - len(weights) + r
        sums[0] += row
        for key in range(position + 1):
            sums[1, position - key] += row[key]
    return sums
