"""Several documents packed into one sequence: the same outputs as running each alone."""

from __future__ import annotations

import torch

from maskdsl import Document, Documents, Sink, Window, compile


def main(lengths: tuple[int, ...] = (700, 1500, 300, 1100)) -> float:
    """Attend within documents, to a window of each; returns the largest difference."""
    total = sum(lengths)
    q, k, v = (torch.randn(1, heads, total, 64) for heads in (4, 2, 2))
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    packed = compile(Document("doc") & Window(512), backend="torch")
    out = packed(q, k, v, doc=Documents.from_cu_seqlens(edges, total))

    alone = compile(Window(512), backend="torch")
    parts = [alone(*(t[:, :, a:b] for t in (q, k, v)))
             for a, b in zip(edges.tolist(), edges[1:].tolist(), strict=False)]
    error = float((out - torch.cat(parts, 2)).abs().max())
    print(f"{len(lengths)} documents, {total:,} tokens: difference to each alone {error:.1e}")

    # The start of the pack is the start of one document only: for the others a sink is foreign.
    with_sink = Document("doc") & (Sink(4) | Window(512))
    doc = Documents.from_cu_seqlens(edges, total)
    with_sink.show(total, slots={"doc": doc}, width=64)
    with_sink.plot(total, slots={"doc": doc}, path="documents.png")
    print("picture: documents.png")
    return error


if __name__ == "__main__":
    main()
