"""The gradients' kernels where the hardware copies tiles, their descriptors read in the
interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradient_oracle import check_gradients
from oracle import Case

from maskdsl import (
    BlockIndices,
    Blocks,
    Columns,
    LastQ,
    Mask,
    PerHead,
    Sink,
    Softcap,
    VerticalSlash,
    VSIndices,
    Window,
)
from maskdsl.codegen import backward_run
from maskdsl.codegen.kernel import interpreting

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU is here: see tests/gpu")
TRIANGLE = Sink(5) | Window(20) | LastQ(10)
OPTIONS = {"backend": "triton", "tile": (16, 16)}
VS = VSIndices(torch.tensor([[[1, 2, 30, 45]]]), torch.tensor([[[0, 3, 33]]]))


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """As on a Hopper GPU; which walks read through descriptors."""
    seen: list[tuple[bool, bool]] = []
    real = backward_run.Run.gradients

    def gradients(self: backward_run.Run) -> Any:
        seen.append(self.copied)
        return real(self)

    monkeypatch.setattr(backward_run.Run, "gradients", gradients)
    monkeypatch.setattr(backward_run, "fits_tma", lambda t, strides: all(
        step or n == 1 for step, n in zip(strides, t.shape[:3], strict=True)))
    return seen


@pytest.mark.parametrize(("mask", "slots"), [
    (TRIANGLE, {}), (VerticalSlash("vs") | TRIANGLE, {"vs": VS}),
    (Columns("c") | Window(9), {"c": torch.tensor([[[0, 3, 60]]])}),
    (Blocks("b", 16, 16) - Sink(3), {"b": BlockIndices.from_mask(
        torch.ones(1, 1, 5, 5, dtype=torch.bool), 16, 16)}),
    (PerHead([TRIANGLE, Sink(20) | Window(9)]), {}),
], ids=lambda x: repr(x)[:40] if isinstance(x, Mask) else "")
def test_masks(copied: list[tuple[bool, bool]], mask: Mask, slots: dict[str, Any]) -> None:
    """A last tile with rows that do not exist; Dv != D, neither a power of two."""
    check_gradients(Case(mask, 76, 76, 1, 2, 1, 24, 40, options=OPTIONS, slots=slots))
    assert copied == [(True, True)]


def test_dead_rows_and_a_chunk(copied: list[tuple[bool, bool]]) -> None:
    case = Case(Window(8), 52, 20, 2, 2, 2, 16, dtype=torch.float16, options=OPTIONS)
    check_gradients(case)  # the first rows see no key
    check_gradients(Case(TRIANGLE, 40, 100, 1, 2, 1, 16, q_offset=30, total_len=120,
                         options=OPTIONS), with_lse=False)
    assert copied == [(True, True)] * 2


def test_calls_that_are_read_through_pointers(copied: list[tuple[bool, bool]]) -> None:
    """Rows not in fours; modified scores, which may overflow where there is no row."""
    check_gradients(Case(TRIANGLE, 37, 37, 1, 2, 1, 16, options=OPTIONS))
    check_gradients(Case(TRIANGLE, 36, 36, 1, 2, 1, 16, scores=(Softcap(2.0),), options=OPTIONS))
    assert copied == [(True, False)] * 2
