"""The Hopper kernel beyond one plain mask: head dimensions up to 256, rows that are not padded,
masks that differ by kind of head or have dead tiles inside. Needs an H100 or H200."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hopper_marks import NEEDS_HOPPER
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, check_case, make_inputs
from strategies import masks, shapes

import maskdsl
from maskdsl import (
    Empty,
    FirstQ,
    Full,
    LastQ,
    Mask,
    PerHead,
    RandomBlocks,
    Shape,
    Sink,
    Stride,
    Where,
    Window,
)
from maskdsl.codegen.hopper_cut import refuse_mask
from maskdsl.simplify import simplify

pytestmark = NEEDS_HOPPER

TRIANGLE = Sink(8) | Window(512) | LastQ(128)
DIMS = [(256, 256), (192, 128), (96, 96), (72, 40), (128, 96), (160, 160), (192, 192), (200, 72),
        (256, 64), (248, 248)]
KINDS = [  # 8 heads each
    (PerHead([Full(), TRIANGLE, TRIANGLE, Full(), Sink(9), Empty(), TRIANGLE, Full()]), True),
    (PerHead([Full()] * 4 + [TRIANGLE] * 4), True),
    (PerHead([Window(100), Window(100), Sink(40) | FirstQ(7), Sink(40) | FirstQ(7)] * 2), False),
    (PerHead([Where(lambda b, h, q, k: q - k < 40 * (h + 1)), Window(70)] * 4), True),
    (PerHead([Where(lambda b, h, q, k: (q + k) % 3 > 0), LastQ(50)] * 4), True),
]
SIEVED = [RandomBlocks(64, 3) | Window(192), Where(lambda b, h, q, k: k % 256 == 0),
          Where(lambda b, h, q, k: (k % 100 < 9) & (q >= 40 * h)) | Sink(3) | LastQ(5)]
FORCED = {"backend": "hopper"}


def case_of(mask: Mask, q_len: int, kv_len: int, *sizes: int, **more: Any) -> Case:
    """A case that runs on the Hopper kernel or fails."""
    return Case(mask, q_len, kv_len, *sizes, options=FORCED, **more)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "value_dim"), DIMS)
def test_head_sizes(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    more: Any = {"value_dim": value_dim, "dtype": dtype}
    check_case(case_of(TRIANGLE, 1000, 1000, 1, 4, 1, dim, **more), "cuda")
    check_case(case_of(Full(), 500, 700, 2, 2, 1, dim, **more), "cuda")
    check_case(case_of(Window(100, 30) | FirstQ(5) | Sink(3), 333, 333, 1, 6, 3, dim, causal=False,
                       **more), "cuda")
    check_case(case_of(TRIANGLE, 1, 300, 1, 1, 1, dim, **more), "cuda")


@settings(max_examples=40, deadline=None)
@given(masks(), shapes(max_len=300), st.sampled_from(DIMS))
def test_random_masks(mask: Mask, shape: Shape, dims: tuple[int, int]) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if refuse_mask(simplify(mask), by_name=True) or not shape.q_len or not shape.kv_len:
        return
    if max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        check_case(case_of(mask, shape.q_len, shape.kv_len, 1, 4, 1, *dims, dtype=torch.float16,
                           causal=False, q_offset=shape.q_offset, total_len=shape.total_len),
                   "cuda")


@pytest.mark.parametrize(("mask", "causal"), KINDS, ids=lambda x: repr(x)[:60])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_kinds_of_heads(mask: Mask, causal: bool, dim: int) -> None:
    for q_len, kv_len, batch, kv_heads in [(1000, 1000, 2, 2), (1, 300, 1, 8), (130, 1000, 3, 4)]:
        check_case(case_of(mask, q_len, kv_len, batch, 8, kv_heads, dim, dtype=torch.bfloat16,
                           causal=causal), "cuda")


@pytest.mark.parametrize("mask", SIEVED, ids=lambda x: repr(x)[:40])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_dead_tiles(mask: Mask, dim: int) -> None:
    """The planning warp lists the live grains of an item while others read the list before."""
    for q_len, kv_len, causal in [(1000, 1000, True), (1, 300, True), (130, 1000, False)]:
        check_case(case_of(mask, q_len, kv_len, 2, 4, 1, dim, dtype=torch.bfloat16, causal=causal),
                   "cuda")
    q, k, v = make_inputs(case_of(mask, 12000, 12000, 1, 8, 2, dim, dtype=torch.bfloat16), "cuda")
    hopper, portable = (maskdsl.compile(mask, backend=name) for name in ("hopper", "triton"))
    (out, lse), (expected, expected_lse) = (f(q, k, v, return_lse=True) for f in (hopper, portable))
    assert (out.float() - expected.float()).abs().max() < 2e-2
    assert torch.equal(lse.isfinite(), expected_lse.isfinite())
    assert (lse - expected_lse).nan_to_num(0.0).abs().max() < 2e-5
    for _ in range(20):
        assert torch.equal(hopper(q, k, v), out)


@pytest.mark.parametrize(("dim", "value_dim"), [(256, 256), (192, 128), (96, 96)])
def test_long_calls_agree_with_the_portable_kernel(dim: int, value_dim: int) -> None:
    """Many items a program, and last rows cut along their keys and joined again."""
    case = case_of(TRIANGLE, 16000, 16000, 1, 4, 1, dim, value_dim=value_dim, dtype=torch.bfloat16)
    q, k, v = make_inputs(case, "cuda")
    hopper, portable = (maskdsl.compile(TRIANGLE, backend=name) for name in ("hopper", "triton"))
    (out, lse), (expected, expected_lse) = (f(q, k, v, return_lse=True) for f in (hopper, portable))
    assert (out.float() - expected.float()).abs().max() < 2e-2
    assert (lse - expected_lse).abs().max() < 2e-5
    for _ in range(20):
        assert torch.equal(hopper(q, k, v), out)


def test_defaults() -> None:
    """Large heads, kinds of heads and periodic masks by default, random blocks by name."""
    q, k, v = make_inputs(Case(TRIANGLE, 64, 64, 1, 8, 2, 256, dtype=torch.bfloat16), "cuda")
    for mask in (TRIANGLE, PerHead([Full(), TRIANGLE] * 4), Stride(256) | Window(64)):
        attn = maskdsl.compile(mask)
        assert attn.backend == "hopper" and attn.refusal(q, k, v) == ""
    blocks = RandomBlocks(64, 3) | Window(192)
    assert maskdsl.compile(blocks).backend == "triton"
    assert maskdsl.compile(blocks, backend="hopper").refusal(q, k, v) == ""
