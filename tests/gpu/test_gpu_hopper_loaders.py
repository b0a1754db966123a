"""The Hopper kernel with two warps that load, one for keys and one for values. Needs an H100 or
H200."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hopper_marks import NEEDS_HOPPER
from oracle import Case, check_case, make_inputs
from test_gpu_hopper_lists import make_data

import maskdsl
from maskdsl import (
    Causal,
    Empty,
    FirstQ,
    Full,
    LastQ,
    Mask,
    PerHead,
    Sink,
    VerticalSlash,
    Where,
    Window,
)
from maskdsl.codegen import hopper, hopper_listed
from maskdsl.codegen.hopper_cut import pick_hopper
from maskdsl.codegen.hopper_lists import pick_listed

pytestmark = NEEDS_HOPPER

TRIANGLE = Sink(8) | Window(512) | LastQ(128)
MASKS: list[tuple[Mask, bool]] = [
    (TRIANGLE, True), (Full(), True), (Full(), False), (Empty(), True),
    (Window(100, 30) | FirstQ(5) | Sink(3), False), (~Window(300), True),
    (Where(lambda b, h, q, k: k % 256 == 0), True), (PerHead([Full(), TRIANGLE] * 2), True)]
LENGTHS = [(1, 1), (17, 17), (1000, 1000), (130, 1000), (700, 333), (2048, 2048)]
FORCED = {"backend": "hopper"}


@pytest.fixture(autouse=True)
def two_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels of the test load with two warps."""
    for module, name, pick in ((hopper, "pick_hopper", pick_hopper),
                               (hopper_listed, "pick_listed", pick_listed)):
        def other(*call: Any, pick: Any = pick) -> Any:
            return replace(pick(*call), loaders=2)

        monkeypatch.setattr(module, name, other)


@pytest.mark.parametrize(("mask", "causal"), MASKS, ids=lambda x: repr(x)[:40])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_mask_and_length(mask: Mask, causal: bool, dim: int) -> None:
    for q_len, kv_len in LENGTHS:
        check_case(Case(mask, q_len, kv_len, 2, 4, 1, dim, dtype=torch.bfloat16, causal=causal,
                        options=FORCED), "cuda")


@pytest.mark.parametrize("heads", [1, 8])
def test_lists(heads: int) -> None:
    for mask in (VerticalSlash("vs"), TRIANGLE | VerticalSlash("vs")):
        check_case(Case(mask, 1000, 1000, 1, 8, 2, 128, options=FORCED, dtype=torch.bfloat16,
                        slots=make_data(mask, 1000, heads)), "cuda")


@pytest.mark.parametrize("mask", [TRIANGLE, Full(), Window(1024)], ids=repr)
def test_long_calls_are_the_same_bits_every_time(mask: Mask, monkeypatch: pytest.MonkeyPatch
                                                 ) -> None:
    """Many items a program, and heavy rows cut; the same bits as with one loader."""
    q, k, v = make_inputs(Case(mask, 16000, 16000, 1, 8, 2, 128, dtype=torch.bfloat16), "cuda")
    two = maskdsl.compile(Causal() & mask, backend="hopper")
    out = two(q, k, v)
    for _ in range(30):
        assert torch.equal(two(q, k, v), out)
    monkeypatch.setattr(hopper, "pick_hopper", pick_hopper)
    assert torch.equal(maskdsl.compile(Causal() & mask, backend="hopper")(q, k, v), out)
