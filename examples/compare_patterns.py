"""Ten patterns side by side: what they keep, what they cost, and how much attention they catch."""

from __future__ import annotations

import torch

from maskdsl import Causal, Full, Mask, Window, plot_masks, study
from maskdsl.compare import compare_masks
from maskdsl.patterns import (
    bigbird,
    chunked,
    dilated_window,
    longformer,
    longnet,
    sliding_window,
    sparse_transformer_fixed,
    sparse_transformer_strided,
    streaming_llm,
    triangle,
)

PATTERNS: dict[str, Mask] = {
    "sliding window": sliding_window(256),
    "dilated window": dilated_window(256, 4),
    "chunked": chunked(512),
    "StreamingLLM": streaming_llm(4, 252),
    "triangle": triangle(8, 256, 64),
    "Longformer": longformer(256, 16, causal=True),
    "BigBird": bigbird(64, 3, 1, 2),
    "Sparse Transformer, strided": sparse_transformer_strided(64),
    "Sparse Transformer, fixed": sparse_transformer_fixed(64, 4),
    "LongNet": longnet([256, 512, 1024, 2048], [1, 2, 4, 8]),
}


def make_attention(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [1, 4, L, 32], k and v [1, 2, L, 32] with what trained heads show: sinks at the start,
    neighbours that look alike, and a few keys that all queries want."""
    g = torch.Generator().manual_seed(0)
    steps = torch.randn(1, 2, length, 32, generator=g)
    k = torch.nn.functional.avg_pool1d(steps[0].transpose(1, 2), 9, 1, 4).transpose(1, 2)[None] * 3
    k[:, :, :4] += 2.0
    k[:, :, torch.randint(length, (8,), generator=g)] += 1.5
    q = k.repeat_interleave(2, 1) + 0.5 * torch.randn(1, 4, length, 32, generator=g) + 0.5
    return q, k, torch.randn(1, 2, length, 32, generator=g)


def main(length: int = 4096, rows: int = 512) -> None:
    """Print both tables; write the masks and the Pareto picture."""
    print(compare_masks([Causal() & mask for mask in PATTERNS.values()], length), "\n")
    more = {"half": Window(length // 2), "dense": Full()}
    found = study([make_attention(length)], {**PATTERNS, **more}, rows=rows)
    print(found)
    found.plot("patterns_pareto.png")
    plot_masks({name: Causal() & mask for name, mask in PATTERNS.items()}, length,
               path="patterns.png")
    print("pictures: patterns.png, patterns_pareto.png")


if __name__ == "__main__":
    main()
