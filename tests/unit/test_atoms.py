"""Atoms: the fixed meaning of each against plain Python, and what their arguments may be."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Callable
from typing import Any

import pytest
from test_slots import MEANINGS as DYNAMIC

from maskdsl import (
    Band,
    BlockDiagonal,
    Causal,
    Chunk,
    Diagonal,
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
    Window,
    dense,
    errors,
)
from maskdsl.expr import ATOMS

Meaning = Callable[[int, int, int], bool]  # p, k, total_len

MEANINGS: list[tuple[Mask, Meaning]] = [
    (Full(), lambda p, k, t: True),
    (Empty(), lambda p, k, t: False),
    (Causal(), lambda p, k, t: k <= p),
    (Sink(4), lambda p, k, t: k < 4),
    (Window(5), lambda p, k, t: 0 <= p - k < 5),
    (Window(5, 3), lambda p, k, t: p - k < 5 and k - p <= 3),
    (LastQ(3), lambda p, k, t: p >= t - 3),
    (FirstQ(3), lambda p, k, t: p < 3),
    (Band(2, 4), lambda p, k, t: 2 <= p - k < 6),
    (Band(-3, 2), lambda p, k, t: p - k in (-3, -2)),
    (Diagonal(2), lambda p, k, t: p - k == 2),
    (QueryRange(3, 7), lambda p, k, t: 3 <= p < 7),
    (KeyRange(3, 7), lambda p, k, t: 3 <= k < 7),
    (Chunk(4), lambda p, k, t: p // 4 == k // 4),
    (PrefixLM(5), lambda p, k, t: k < 5 or k <= p),
    (BlockDiagonal([3, 1, 30]), lambda p, k, t: 0 <= p < 34 and k < 34 and any(
        a <= p < b and a <= k < b for a, b in ((0, 3), (3, 4), (4, 34)))),
    (Stride(4, 3), lambda p, k, t: k % 4 == 3),
    (Dilated(3, 4), lambda p, k, t: 0 <= p - k < 12 and (p - k) % 4 == 0),
    (Slash([0, 3, -2]), lambda p, k, t: p - k in (0, 3, -2)),
    (Vertical([9, 2, 3]), lambda p, k, t: k in (2, 3, 9)),
]


@pytest.mark.parametrize(("mask", "meaning"), MEANINGS, ids=[repr(m) for m, _ in MEANINGS])
@pytest.mark.parametrize("shape", [Shape(20, 20), Shape(5, 17), Shape(17, 5), Shape(6, 15, 4, 40)])
def test_fixed_meaning(mask: Mask, meaning: Meaning, shape: Shape) -> None:
    live = dense(mask, shape)[0, 0].tolist()
    for row in range(shape.q_len):
        p = row + shape.q_offset
        assert live[row] == [meaning(p, k, shape.total_len) for k in range(shape.kv_len)]


def test_every_atom_has_its_meaning_tested() -> None:
    here = {type(mask).__name__ for mask, _ in MEANINGS} | {"RandomBlocks"}
    assert here | set(DYNAMIC) == set(ATOMS)


def test_window_counts_the_query_itself() -> None:
    assert dense(Window(4), Shape(10, 10))[0, 0].sum(1).tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4, 4]


def test_random_blocks_are_whole_seeded_blocks() -> None:
    live = dense(RandomBlocks(8, 2, seed=1), Shape(64, 64))[0, 0].view(8, 8, 8, 8)
    blocks = live[:, 0, :, 0]
    assert (live == blocks[:, None, :, None]).all()
    assert (blocks.sum(1) >= 1).all()
    assert (blocks.sum(1) <= 2).all()
    other = dense(RandomBlocks(8, 2, seed=2), Shape(64, 64))[0, 0].view(8, 8, 8, 8)[:, 0, :, 0]
    assert (blocks != other).any()


WRONG: list[tuple[Callable[[], Mask], str]] = [
    (lambda: Sink(-1), "n must be an integer >= 0"),
    (lambda: Sink(2.5), "n must be an integer"),  # type: ignore[arg-type]
    (lambda: Sink(True), "n must be an integer"),
    (lambda: Sink("4"), "n must be an integer"),  # type: ignore[arg-type]
    (lambda: Sink(1 << 31), "32-bit"),
    (lambda: Window(4, -1), "right must be"),
    (lambda: LastQ(None), "n must be"),  # type: ignore[arg-type]
    (lambda: Chunk(0), "size must be an integer >= 1"),
    (lambda: Band(1.0, 2), "offset must be an integer"),  # type: ignore[arg-type]
    (lambda: Band(1 << 30, 1), "reaches more"),
    (lambda: KeyRange(7, 3), "ends before it starts"),
    (lambda: QueryRange(7, 3), "ends before it starts"),
    (lambda: Stride(4, 4), "never 4"),
    (lambda: Stride(0), "step must be"),
    (lambda: Dilated(1 << 20, 1 << 20), "reaches more"),
    (lambda: Slash("abc"), "list of integers"),  # type: ignore[arg-type]
    (lambda: Slash(7), "list of integers"),  # type: ignore[arg-type]
    (lambda: Vertical([-1]), "integers >= 0"),
    (lambda: Vertical([1.5]), "1.5"),  # type: ignore[list-item]
    (lambda: Vertical(range(0, 4000, 2)), "at most 512"),  # type: ignore[arg-type]
    (lambda: BlockDiagonal([]), "between 1 and 512"),
    (lambda: BlockDiagonal([3, 0]), "integers >= 1"),
    (lambda: RandomBlocks(64, 0), "count must be"),
    (lambda: RandomBlocks(64, 65), "at most 64"),
]


@pytest.mark.parametrize(("make", "text"), WRONG)
def test_a_wrong_argument_is_told(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(errors.AtomArgumentError, match=text) as caught:
        make()
    assert all(part in str(caught.value) for part in ("you wrote:", "problem:", "instead:"))


def test_lists_are_kept_in_normal_form() -> None:
    assert Vertical([3, 1, 3]) == Vertical((1, 3))
    assert Slash(range(3)) == Slash([2, 1, 0])  # type: ignore[arg-type]
    assert Vertical(range(4000)).columns[-1] == 3999  # type: ignore[arg-type]  # one run


@pytest.mark.parametrize("name", [
    "maskdsl.atoms", "maskdsl.periodic", "maskdsl.where", "maskdsl.shape", "maskdsl.simplify",
    "maskdsl.patterns.classic", "maskdsl.patterns.trianglemix"])
def test_the_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
