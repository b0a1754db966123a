"""Laws 3 and 4, and the counts: what the geometry says is what the dense mask shows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import SIZE, masks, ranges, shapes

from maskdsl import (
    Band,
    Causal,
    Chunk,
    Dilated,
    FirstQ,
    Full,
    KeyRange,
    LastQ,
    Mask,
    PrefixLM,
    QueryRange,
    RandomBlocks,
    Shape,
    Sink,
    Stride,
    VerticalSlash,
    Where,
    Window,
    dense,
    simplify,
)
from maskdsl.codegen.counts import N, count_closed
from maskdsl.row_counts import class_rows
from maskdsl.spans import spans
from maskdsl.tiles import TileClass, can_count, classify_tile, count_pairs, rasterise


@given(masks(), shapes())
def test_rasterised_spans_are_the_mask(mask: Mask, shape: Shape) -> None:
    assert (rasterise(mask, shape) == dense(mask, shape)[0, 0].numpy()).all()


@given(masks(), shapes(), st.integers(0, 70), st.integers(0, 70), st.integers(1, 24),
       st.integers(1, 24))
def test_tile_class_is_any_and_all(mask: Mask, shape: Shape, row: int, key: int, height: int,
                                   width: int) -> None:
    tile = dense(mask, shape)[0, 0, row:row + height, key:key + width]
    expected = TileClass.DEAD if not tile.any() else \
        TileClass.FULL if tile.all() else TileClass.MIXED
    assert classify_tile(mask, shape, (row, row + height), (key, key + width)) is expected


@given(masks(), shapes())
def test_counted_pairs_are_those_of_the_mask(mask: Mask, shape: Shape) -> None:
    assert count_pairs(mask, shape) == int(dense(mask, shape).sum())


def straight_masks() -> st.SearchStrategy[Mask]:
    """Masks of atoms whose bounds are lines: these mostly have a closed form."""
    lines = st.one_of(
        st.builds(Full), st.builds(Causal), st.builds(Sink, SIZE), st.builds(Window, SIZE, SIZE),
        st.builds(LastQ, SIZE), st.builds(FirstQ, SIZE), st.builds(PrefixLM, SIZE),
        st.builds(Band, st.integers(-40, 40), SIZE), ranges(KeyRange), ranges(QueryRange))
    return st.recursive(lines, lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda ab: ab[0] | ab[1]),
        st.tuples(inner, inner).map(lambda ab: ab[0] & ab[1]),
        st.tuples(inner, inner).map(lambda ab: ab[0] - ab[1])), max_leaves=5)


@given(st.one_of(straight_masks(), masks(max_leaves=4)), st.integers(0, 40))
def test_closed_form_is_the_count(mask: Mask, more: int) -> None:
    closed = count_closed(simplify(mask))
    if closed is not None and closed.valid_from < 400:
        for n in (closed.valid_from, closed.valid_from + more):
            assert int(closed.pairs.subs(N, n)) == count_pairs(mask, Shape(n, n))


@pytest.mark.parametrize(("mask", "text"), [
    (Causal(), "N**2/2 + N/2"), (Window(4), "4*N - 6"),
    (Causal() & (Sink(4) | Window(2048)), "2052*N - 2104326")])
def test_closed_forms_known_by_hand(mask: Mask, text: str) -> None:
    closed = count_closed(mask)
    assert closed is not None
    assert str(closed.pairs) == text


@pytest.mark.parametrize("mask", [Chunk(64), Stride(8), Window(9) | Chunk(7),
                                  Where(lambda b, h, q, k: k < 3 * q)])
def test_no_closed_form_is_invented(mask: Mask) -> None:
    assert count_closed(mask) is None


def test_counting_a_million_rows_takes_no_square() -> None:
    mask = Causal() & (Sink(4) | Window(2048))
    assert count_pairs(mask, Shape(1 << 20, 1 << 20)) == 2052 * (1 << 20) - 2104326


@pytest.mark.parametrize(("mask", "pairs"), [
    # rows p keep the keys 0, 64, ... up to p: sum of p // 64 + 1
    (Causal() & Stride(64), sum(p // 64 + 1 for p in range(1 << 20))),
    # the keys p, p - 8, ... of the last 100 steps
    (Dilated(100, 8), sum(min(100, p // 8 + 1) for p in range(1 << 20)))])
def test_periodic_masks_of_a_million_tokens_are_counted(mask: Mask, pairs: int) -> None:
    shape = Shape(1 << 20, 1 << 20)
    assert can_count(mask, shape) and count_pairs(mask, shape) == pairs


def test_what_is_counted_by_classes_of_rows() -> None:
    """Against testing every pair, where conditions see p % n, p // n, or p itself."""
    for mask, known in (
            (Causal() & (Stride(5, 2) | Window(9) | RandomBlocks(8, 2, seed=3)), True),
            (Where(lambda b, h, q, k: (q - 2 * k + 3) % 6 == 1) | Dilated(7, 3), True),
            (Where(lambda b, h, q, k: (q * q + k) % 3 == 0), False),
            (Where(lambda b, h, q, k: q * k < 900), False)):
        for shape in (Shape(130, 130), Shape(40, 130), Shape(50, 130, 20, 300)):
            assert can_count(mask, shape) == known
            assert count_pairs(mask, shape) == int(dense(mask, shape).sum())
    p = np.arange(40, dtype=np.int64)
    assert class_rows(spans(VerticalSlash("vs")), p) is None
