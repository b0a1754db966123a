"""Masks as pictures: characters for docstrings and terminals, PNG or SVG for documents."""

from __future__ import annotations

import textwrap
from pathlib import Path

from maskdsl.dense import dense
from maskdsl.expr import Mask
from maskdsl.shape import Shape


def draw_text(mask: Mask, q_len: int, kv_len: int | None = None) -> str:
    """`#` for a live pair, `·` for a dead one; one line a query row."""
    live = dense(mask, Shape(q_len, q_len if kv_len is None else kv_len))[0, 0]
    return "\n".join("".join("#" if x else "·" for x in row) for row in live.tolist())


def save_picture(mask: Mask, path: str | Path, length: int = 128, block: int = 0) -> Path:
    """Draw the mask of a square call of `length` tokens into a PNG, SVG or PDF file.

    block  draw tile borders every `block` tokens; 0 for none
    Needs matplotlib: `pip install maskdsl[plot]`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(dense(mask, Shape(length, length))[0, 0].numpy(), cmap="Blues", vmin=0, vmax=1.35,
                interpolation="nearest", extent=(0, length, length, 0))
    if block:
        ticks = range(0, length + 1, block)
        axes.set_xticks(ticks)
        axes.set_yticks(ticks)
        axes.grid(color="0.75", linewidth=0.5)
    axes.set(xlabel="key", ylabel="query")
    axes.set_title(textwrap.fill(repr(mask), 64), fontsize=9)
    figure.savefig(path, dpi=150)
    return Path(path)
