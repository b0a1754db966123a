"""The calls that the cost model is held against: a spread of masks, lengths, heads and data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.measure import MASKS, device, mask_of
from benchmarks.vertical_slash import make_indices
from maskdsl import (
    BlockIndices,
    Blocks,
    Chunk,
    ColumnIndices,
    Columns,
    Full,
    LastQ,
    Mask,
    PerHead,
    RandomBlocks,
    Sink,
    Stride,
    VerticalSlash,
    Window,
)

TRIANGLES = [mask_of(sizes) for sizes in MASKS.values()]
REHEARSAL = 256  # tokens, where there is no GPU


@dataclass
class Case:
    """One call to measure.

    make  makes the slots' data where the call runs; None: a static mask
    """

    mask: Mask
    length: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    make: Callable[[], dict[str, Any]] | None = None
    what: str = ""


def all_cases() -> list[Case]:
    """Static and dynamic ones; without a GPU each kind once, with few heads and tokens."""
    cases = [*static_cases(), *dynamic_cases()]
    if device() == "cuda":
        return cases
    kinds: dict[Any, Case] = {}
    for case in cases:
        kinds.setdefault((case.mask, case.kv_heads), case)
    return list(kinds.values())


def size(length: int) -> int:
    """A length, or that of a rehearsal."""
    return length if device() == "cuda" else REHEARSAL


def static(mask: Mask, length: int, heads: int = 32, kv_heads: int = 8, dim: int = 128) -> Case:
    """A case without data; a rehearsal has a quarter of the heads."""
    if device() == "cpu":
        heads, kv_heads, dim = max(4, heads // 4), max(1, kv_heads // 4), 16
    return Case(mask, size(length), heads, kv_heads, dim)


def static_cases() -> Iterator[Case]:
    """Narrow and wide masks, short and long calls, few heads, small heads, periodic masks."""
    for length in (2048, 4096, 8192, 16384, 32768):
        yield static(Full(), length)
    for mask in TRIANGLES:
        for length in (8192, 32768, 131072):
            yield static(mask, length)
    for width in (256, 1024, 4096, 8192):
        yield static(Window(width), 32768)
    yield static(Window(256), 131072)
    yield static(Chunk(4096), 32768)
    yield static(Stride(64) | Window(512), 16384)
    yield static(RandomBlocks(64, 8) | Window(192), 32768)
    for heads, kv_heads in ((4, 1), (8, 2)):
        for mask in (Full(), TRIANGLES[1]):
            yield static(mask, 32768, heads, kv_heads)
        yield static(TRIANGLES[0], 131072, heads, kv_heads)
    for mask in (Sink(200) | Window(400), Window(512) & LastQ(30000)):  # several masked tiles
        yield static(mask, 32768)
    for mask in (Full(), *TRIANGLES):
        yield static(mask, 16384, dim=64)
    per_head = (Full(),) * 8 + (TRIANGLES[0],) * 24
    yield static(PerHead(per_head if device() == "cuda" else per_head[4:12]), 32768)


def near_and_far_blocks(length: int, block: int, most: int, heads: int = 8) -> BlockIndices:
    """The diagonal block of every row, and others at random before it."""
    rows, where = length // block, device()
    generator = torch.Generator(device=where).manual_seed(length + most)
    row = torch.arange(rows, device=where)
    order = torch.rand(1, heads, rows, rows, device=where, generator=generator)
    order = order.masked_fill(row[None, :] > row[:, None], -1)
    order[..., row, row] = 2
    top = order.topk(min(most, rows), -1)
    return BlockIndices.from_topk(torch.where(top.values < 0, -1, top.indices), block, block)


def dynamic(slot: str, mask: Mask, length: int, make: Callable[..., Any], *arguments: int,
            what: str = "") -> Case:
    """A case whose slot is filled by make(length, *arguments)."""
    heads, kv_heads, dim = (32, 8, 128) if device() == "cuda" else (8, 2, 16)
    return Case(mask, size(length), heads, kv_heads, dim,
                partial(fill, slot, make, size(length), arguments), what)


def fill(slot: str, make: Callable[..., Any], length: int,
         arguments: tuple[int, ...]) -> dict[str, Any]:
    """The data of one slot."""
    return {slot: make(length, *arguments)}


def indices(length: int, vertical: int, slash: int, heads: int, run: int) -> Any:
    """`make_indices`; a rehearsal draws as many as its length has, for as many heads as it has."""
    if device() == "cpu":
        vertical, slash, run = min(vertical, 40), min(slash, 64), min(run, 16)
        heads = {32: 8, 8: 2}.get(heads, heads)
    return make_indices(length, vertical, slash, heads, run)


def blocks(length: int, block: int, most: int) -> BlockIndices:
    """`near_and_far_blocks` for as many heads as there are key/value heads."""
    return near_and_far_blocks(length, block, most, 8 if device() == "cuda" else 2)


def columns(length: int, count: int) -> ColumnIndices:
    """Random columns."""
    return ColumnIndices(indices(length, count, 64, 8, 64).vertical)


def dynamic_cases() -> Iterator[Case]:
    """Vertical-slash of several sizes and spreads, unions, blocks, columns, mixed heads."""
    for length in (16384, 32768, 131072):
        for vertical, slash, run in ((1000, 6096, 64), (512, 2048, 64), (30, 800, 16)):
            about = f"{vertical} columns, {slash} slashes in runs of {run}"
            for mask in (VerticalSlash("vs"), TRIANGLES[0] | VerticalSlash("vs")):
                yield dynamic("vs", mask, length, indices, vertical, slash, 8, run, what=about)
    yield dynamic("vs", VerticalSlash("vs"), 32768, indices, 1000, 2048, 8, 1,
                  what="slashes spread at random")
    yield dynamic("vs", VerticalSlash("vs", "block64"), 32768, indices, 1000, 2048, 1, 64,
                  what="2048 slashes")
    for length in (32768, 131072):
        for block, most in ((64, 32), (64, 128), (128, 32)):
            yield dynamic("b", Blocks("b", block, block), length, blocks, block, most,
                          what=f"top {most}")
    yield dynamic("b", Blocks("b", 64, 64) | TRIANGLES[0], 32768, blocks, 64, 32, what="top 32")
    yield dynamic("c", Columns("c") | Window(512), 32768, columns, 2000, what="2000 columns")
    mixed = (VerticalSlash("vs"),) * 16 + (TRIANGLES[0],) * 16
    yield dynamic("vs", PerHead(mixed if device() == "cuda" else mixed[12:20]), 32768, indices,
                  1000, 2048, 32, 64)
