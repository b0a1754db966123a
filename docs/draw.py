"""Draws the pictures under docs/pictures from the code: `python docs/draw.py`.

The files are plain text, the same on every machine, and committed; a test draws them anew and
compares. Each cell is one (query, key) pair; colour tells which operand of the union keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import torch

import maskdsl as m
from maskdsl import patterns
from maskdsl.cells import PALETTE, Grid, find_sources, view_call

FOLDER = Path(__file__).parent / "pictures"
CELL = 6  # pixels
CAUSAL = m.Causal()

VS = m.VSIndices(torch.tensor([[[3, 11, 12]]]), torch.tensor([[[0, 1, 9, 20]]]))
BLOCKS = m.BlockIndices.from_topk(torch.tensor(
    [[[[0, -1, -1], [0, 1, -1], [2, 0, -1], [3, 1, -1], [4, 3, 0], [5, 2, -1], [6, 5, 1],
       [7, 0, 4]]]]), 4, 4)


def best_keys(row: int, count: int = 6) -> list[int]:
    """The keys with the largest made-up scores: near ones, some that many queries like, scatter."""
    liked = {0: 40, 7: 30, 8: 20, 18: 25}

    def score(key: int) -> int:
        scatter = (row * 7919 + key * 104729 + row * key * 31) % 61
        return liked.get(key, 0) + max(0, 80 - 25 * (row - key)) + scatter

    best = sorted(range(row + 1), key=score, reverse=True)[:count]
    return best + [-1] * (count - len(best))


TOKENS = m.TokenIndices(torch.tensor([[[best_keys(row) for row in range(32)]]]))
DOCUMENTS = m.Documents.from_ids(torch.tensor([0] * 9 + [1] * 14 + [2] * 9))

# name -> (mask, slots); 32 x 32 pairs
ATOMS: dict[str, tuple[m.Mask, dict[str, Any]]] = {
    "full": (m.Full(), {}), "empty": (m.Empty(), {}), "causal": (CAUSAL, {}),
    "sink": (m.Sink(4), {}), "window": (m.Window(8), {}), "window_two_sided": (m.Window(6, 4), {}),
    "lastq": (m.LastQ(5), {}), "firstq": (m.FirstQ(5), {}), "band": (m.Band(6, 5), {}),
    "queryrange": (m.QueryRange(8, 16), {}), "keyrange": (m.KeyRange(8, 16), {}),
    "chunk": (m.Chunk(8), {}), "prefixlm": (m.PrefixLM(10), {}),
    "blockdiagonal": (m.BlockDiagonal([5, 12, 15]), {}), "stride": (m.Stride(4, 1), {}),
    "dilated": (m.Dilated(5, 3), {}), "slash": (m.Slash([0, 1, 7, 15]), {}),
    "vertical": (m.Vertical([2, 3, 11, 25]), {}), "randomblocks": (m.RandomBlocks(4, 2, 1), {}),
    "where": (m.Where(lambda b, h, q, k: (q + k) % 4 == 0), {}),
    "perhead": (m.PerHead([CAUSAL & (m.Sink(3) | m.Window(6)), CAUSAL]), {}),
    "verticalslash": (CAUSAL & m.VerticalSlash("vs"), {"vs": VS}),
    "blocks": (CAUSAL & m.Blocks("blk", 4, 4), {"blk": BLOCKS}),
    "columns": (CAUSAL & m.Columns("cols"), {"cols": torch.tensor([[[2, 3, 17]]])}),
    "tokentopk": (CAUSAL & m.TokenTopK("idx"), {"idx": TOKENS}),
    "document": (CAUSAL & m.Document("doc"), {"doc": DOCUMENTS}),
    "prefix": (m.Prefix("n"), {"n": torch.tensor([9])}),
}

PATTERNS: dict[str, m.Mask] = {
    "sliding_window": CAUSAL & patterns.sliding_window(8),
    "dilated_window": CAUSAL & patterns.dilated_window(6, 3),
    "chunked": CAUSAL & patterns.chunked(8),
    "prefix_lm": patterns.prefix_lm(10),
    "streaming_llm": CAUSAL & patterns.streaming_llm(3, 7),
    "tri_shape": CAUSAL & patterns.tri_shape(4, 6, 4),
    "triangle": CAUSAL & patterns.triangle(2, 7, 5),
    "longformer": patterns.longformer(8, 3),
    "bigbird": patterns.bigbird(4, 3, 1, 1),
    "sparse_transformer_strided": CAUSAL & patterns.sparse_transformer_strided(6),
    "sparse_transformer_fixed": CAUSAL & patterns.sparse_transformer_fixed(8, 2),
    "longnet": CAUSAL & patterns.longnet([8, 16, 32], [1, 2, 4]),
}

OTHERS: dict[str, tuple[m.Mask, int]] = {  # name -> (mask, tokens)
    "readme": (CAUSAL & (m.Sink(4) | m.Window(12) | m.LastQ(5)), 48),
}


def draw(mask: m.Mask, length: int = 32, slots: Mapping[str, object] | None = None) -> str:
    """An SVG of a square call of `length` tokens; heads of a PerHead side by side."""
    shape, heads = m.Shape(length, length), m.heads.count_heads(mask) or 1
    width, size = (length + 4) * CELL * heads - 4 * CELL, length * CELL
    names: list[str] = []
    parts = []
    for head in range(heads):
        view = view_call(mask, shape, 0, head, heads, slots)
        sources = find_sources(mask, Grid.over((0, length), (0, length), length, length), view)
        left = head * (length + 4) * CELL
        parts.append(f'<rect x="{left}" width="{size}" height="{size}" fill="#f3f3f3"/>')
        for i, name in enumerate(sources.names):
            names.append(name) if name not in names else None
            colour = PALETTE[names.index(name) % len(PALETTE)]
            path = trace_cells((sources.owner == i).tolist(), left)
            if path:
                parts.append(f'<path fill="{colour}" d="{path}"/>')
    text = []
    if len(names) > 1:
        text = [f'<rect y="{size + 8 + 16 * i}" width="10" height="10" '
                f'fill="{PALETTE[i % len(PALETTE)]}"/><text x="15" y="{size + 17 + 16 * i}" '
                f'font-size="11" font-family="monospace" fill="#777">{escape(name)}</text>'
                for i, name in enumerate(names)]
    high = size + (4 + 16 * len(names) if text else 0)
    wide = max(width, *(15 + 7 * len(name) for name in names)) if text else width
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" '
        f'height="{high}">', f"<title>{escape(repr(mask))}</title>", *parts, *text, "</svg>", ""])


def trace_cells(live: list[list[bool]], left: int) -> str:
    """The live cells as one path: runs of a row, joined with equal runs of the rows below."""
    open_: dict[tuple[int, int], int] = {}  # (first, last + 1) -> row it began
    path = []
    for y, row in enumerate([*live, []]):
        edges = [x for x in range(len(row) + 1)
                 if (x < len(row) and row[x]) != (x > 0 and row[x - 1])]
        runs = set(zip(edges[::2], edges[1::2], strict=True))
        for run in sorted(set(open_) - runs):
            top = open_.pop(run)
            path.append(f"M{left + run[0] * CELL} {top * CELL}h{(run[1] - run[0]) * CELL}"
                        f"v{(y - top) * CELL}h{(run[0] - run[1]) * CELL}z")
        for run in runs - set(open_):
            open_[run] = y
    return "".join(path)


def draw_all() -> dict[str, str]:
    """File name -> text of every picture."""
    files = {f"atom_{name}.svg": draw(mask, 32, slots) for name, (mask, slots) in ATOMS.items()}
    files |= {f"pattern_{name}.svg": draw(mask) for name, mask in PATTERNS.items()}
    return files | {f"{name}.svg": draw(mask, length) for name, (mask, length) in OTHERS.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in draw_all().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)
