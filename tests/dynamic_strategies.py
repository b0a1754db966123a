"""Hypothesis strategies for masks with runtime slots, and for data that overlaps on purpose."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from strategies import SIZE, masks

from maskdsl import (
    BlockIndices,
    Blocks,
    ColumnIndices,
    Columns,
    Document,
    Documents,
    Empty,
    Full,
    LastQ,
    Mask,
    PerHead,
    Prefix,
    PrefixLengths,
    Shape,
    Sink,
    Stride,
    TokenIndices,
    TokenTopK,
    VerticalSlash,
    VSIndices,
    Window,
)
from maskdsl.dynamic import SlotMask, slots_of

HEADS, KV_HEADS, BATCH = 4, 2, 2  # of the calls these tests make


def slot_atoms() -> st.SearchStrategy[Mask]:
    """Every atom with a slot; one name for each, so that one expression may use it twice."""
    return st.sampled_from([
        VerticalSlash("vs"), VerticalSlash("wide", "block64"), Blocks("blk", 16, 16),
        Blocks("odd", 24, 8), Blocks("big", 64, 64), Columns("cols"), TokenTopK("idx"),
        Document("doc"), Prefix("n")])


def dynamic_masks(max_leaves: int = 4) -> st.SearchStrategy[Mask]:
    """Random expressions with at least one slot; static parts that overlap the lists on purpose."""
    near = st.one_of(st.builds(Sink, SIZE), st.builds(Window, SIZE), masks(2))
    leaves = st.one_of(slot_atoms(), slot_atoms(), near)
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(lambda ab: ab[0] | ab[1]),
            st.tuples(inner, inner).map(lambda ab: ab[0] & ab[1]),
            st.tuples(inner, inner).map(lambda ab: ab[0] - ab[1])),
        max_leaves=max_leaves).filter(lambda mask: bool(slots_of(mask)))


def per_head_masks() -> st.SearchStrategy[Mask]:
    """A mask for each head, some of them equal, under a union or a difference."""
    simple = st.one_of(slot_atoms(), st.builds(Window, SIZE), st.builds(LastQ, SIZE),
                       st.sampled_from([Full(), Empty(), Stride(3), Sink(2) | Window(5)]))
    kinds = st.lists(simple, min_size=1, max_size=3)
    lists = kinds.flatmap(lambda some: st.lists(st.sampled_from(some), min_size=HEADS,
                                                max_size=HEADS))
    return st.tuples(lists, st.builds(Sink, SIZE), st.booleans()).map(
        lambda t: PerHead(t[0]) | t[1] if t[2] else PerHead(t[0]) - t[1])


@st.composite
def slot_data(draw: st.DrawFn, mask: Mask, shape: Shape) -> dict[str, Any]:
    """Data for every slot: duplicates, sentinels, future keys, empty lists, each kind of lead."""
    return {atom.slot: draw(data_of(atom, shape)) for atom in slots_of(mask)}


@st.composite
def data_of(draw: st.DrawFn, atom: SlotMask, shape: Shape) -> Any:
    seed = draw(st.integers(0, 1 << 20))
    lead = (draw(st.sampled_from([1, BATCH])), draw(st.sampled_from([1, KV_HEADS, HEADS])))
    many = draw(st.sampled_from([0, 1, 3, 10, 40]))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    generator = torch.Generator().manual_seed(seed)

    def numbers(*size: int, most: int) -> torch.Tensor:
        return torch.randint(-2, most + 3, (*lead, *size), generator=generator).to(dtype)

    if isinstance(atom, VerticalSlash):
        runs = numbers(many, most=shape.kv_len)
        if draw(st.booleans()):  # neighbours, as real slashes are
            runs = (runs[..., None] + torch.arange(20)).flatten(-2).to(dtype)
        return VSIndices(numbers(many, most=shape.kv_len), runs)
    if isinstance(atom, Columns):
        return ColumnIndices(numbers(many, most=shape.kv_len))
    if isinstance(atom, TokenTopK):
        return TokenIndices(numbers(shape.q_len, many, most=shape.kv_len))
    if isinstance(atom, Document):
        ids = torch.sort(torch.randint(-1, 4, (lead[0], shape.kv_len), generator=generator)).values
        return Documents.from_ids(ids.to(dtype))
    if isinstance(atom, Prefix):
        return PrefixLengths(torch.randint(-1, shape.kv_len + 2, lead[:1], generator=generator))
    assert isinstance(atom, Blocks)
    rows, columns = -(-shape.q_len // atom.q_block), -(-shape.kv_len // atom.kv_block)
    if draw(st.booleans()):
        live = torch.rand(*lead, rows, columns, generator=generator) < draw(
            st.sampled_from([0.0, 0.1, 0.5, 1.0]))
        return BlockIndices.from_mask(live, atom.q_block, atom.kv_block)
    return BlockIndices.from_topk(numbers(rows, many, most=columns), atom.q_block, atom.kv_block)
