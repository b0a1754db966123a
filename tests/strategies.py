"""Hypothesis strategies: random masks, shapes and tile sizes whose borders meet."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from maskdsl import (
    Band,
    BlockDiagonal,
    Causal,
    Chunk,
    Dilated,
    Empty,
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
    Slash,
    Stride,
    Vertical,
    Where,
    Window,
)

SIZE = st.one_of(st.integers(0, 12), st.sampled_from([15, 16, 17, 31, 32, 33, 48, 64]))
PLACE = st.integers(0, 80)


def every_third(b: Any, h: Any, q: Any, k: Any) -> Any:
    """Periodic in the sum: no interval, no sieve."""
    return (q + k) % 3 == 0


def near_or_first(b: Any, h: Any, q: Any, k: Any) -> Any:
    """A window and a sink as a function."""
    return ((q >= k) & (q - k < 9)) | (k < 5)


def checkerboard(b: Any, h: Any, q: Any, k: Any) -> Any:
    """Blocks of 8, every other one."""
    return (q // 8 + k // 8) % 2 != 0


def ahead(b: Any, h: Any, q: Any, k: Any) -> Any:
    """Only the future."""
    return k > q + 3


FUNCTIONS = [every_third, near_or_first, checkerboard, ahead]


@st.composite
def ranges(draw: st.DrawFn, kind: type[KeyRange] | type[QueryRange]) -> Mask:
    """A half-open range, possibly empty."""
    start, stop = sorted((draw(PLACE), draw(PLACE)))
    return kind(start, stop)


def strides() -> st.SearchStrategy[Mask]:
    """Stride with an offset below its step."""
    return st.integers(1, 40).flatmap(
        lambda step: st.builds(Stride, st.just(step), st.integers(0, step - 1)))


def atoms() -> st.SearchStrategy[Mask]:
    """Every atom, with arguments near the lengths and tile sizes the tests use."""
    return st.one_of(
        st.builds(Full), st.builds(Empty), st.builds(Causal),
        st.builds(Sink, SIZE), st.builds(Window, SIZE), st.builds(Window, SIZE, SIZE),
        st.builds(LastQ, SIZE), st.builds(FirstQ, SIZE),
        st.builds(Band, st.integers(-40, 40), SIZE),
        ranges(KeyRange), ranges(QueryRange),
        st.builds(Chunk, st.integers(1, 40)), st.builds(PrefixLM, SIZE), strides(),
        st.builds(Dilated, st.integers(0, 12), st.integers(1, 9)),
        st.builds(Slash, st.lists(st.integers(-20, 60), max_size=9).map(tuple)),
        st.builds(Vertical, st.lists(PLACE, max_size=9).map(tuple)),
        st.builds(RandomBlocks, st.sampled_from([1, 4, 8, 16]), st.integers(1, 3),
                  st.integers(0, 9)),
        st.builds(BlockDiagonal, st.lists(st.integers(1, 30), min_size=1, max_size=8).map(
            lambda sizes: (*sizes, 400))),
        st.builds(Where, st.sampled_from(FUNCTIONS)),
    )


def masks(max_leaves: int = 5) -> st.SearchStrategy[Mask]:
    """Random expressions with | & ~ -."""
    return st.recursive(
        atoms(),
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(lambda ab: ab[0] | ab[1]),
            st.tuples(inner, inner).map(lambda ab: ab[0] & ab[1]),
            st.tuples(inner, inner).map(lambda ab: ab[0] - ab[1]),
            inner.map(lambda a: ~a)),
        max_leaves=max_leaves)


@st.composite
def shapes(draw: st.DrawFn, max_len: int = 80) -> Shape:
    """Square, bottom-right aligned and freely placed calls; lengths 0 and 1 among them."""
    length = st.one_of(st.integers(0, max_len), st.sampled_from([0, 1, 16, 32, 64]))
    q_len, kv_len = draw(length), draw(length)
    match draw(st.integers(0, 3)):
        case 0:
            return Shape(kv_len, kv_len)
        case 1:
            return Shape(q_len, kv_len)
        case 2:
            return Shape(q_len, kv_len, draw(st.integers(0, max_len)))
    return Shape(q_len, kv_len, draw(st.integers(-8, max_len)),
                 kv_len + draw(st.integers(0, max_len)))


def tile_sizes() -> st.SearchStrategy[tuple[int, int]]:
    """(block_m, block_n); smaller than kernels use, so that short calls have many tiles."""
    return st.tuples(st.sampled_from([8, 16, 32]), st.sampled_from([8, 16, 32]))
