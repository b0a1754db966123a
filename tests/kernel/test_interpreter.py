"""Law 8 without a GPU: the emitted kernels in Triton's interpreter against dense attention.

bfloat16 is left out: the interpreter's bfloat16 dot product is silently wrong.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from oracle import Case, check_case, make_inputs
from strategies import masks, shapes

import maskdsl
from maskdsl import (
    BlockDiagonal,
    Causal,
    Chunk,
    Empty,
    FirstQ,
    Full,
    LastQ,
    Mask,
    PrefixLM,
    RandomBlocks,
    Shape,
    Sink,
    Stride,
    Vertical,
    Where,
    Window,
)
from maskdsl.codegen.kernel import interpreting
from maskdsl.errors import DtypeError

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU is here: see tests/gpu")

TRITON = {"backend": "triton"}
TRIANGLE = Sink(4) | Window(40) | LastQ(20)
MASKS: list[tuple[Mask, bool]] = [
    (TRIANGLE, True), (Full(), True), (Full(), False), (Empty(), True),
    (Window(9, 30) | FirstQ(5), False), (Chunk(48) | Stride(64, 5), True), (PrefixLM(33), False),
    (RandomBlocks(32, 2, seed=1), False), (Vertical((1, 40, 41, 99)), True),
    (BlockDiagonal([30, 50, 400]), True), (Where(lambda b, h, q, k: q - k < 9 * (h + 1)), True),
    (~Window(30), True),
]


@pytest.mark.parametrize(("mask", "causal"), MASKS, ids=lambda x: repr(x)[:40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_mask_and_length(mask: Mask, causal: bool, dtype: torch.dtype) -> None:
    for q_len, kv_len in [(1, 1), (17, 17), (130, 130), (1, 70), (40, 100), (70, 33)]:
        check_case(Case(mask, q_len, kv_len, 2, 2, 1, 16, dtype=dtype, causal=causal,
                        options=TRITON))


@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (24, 40), (40, 24), (64, 32), (80, 80)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (7, 1), (4, 2)])
def test_heads_and_sizes(dim: int, value_dim: int, heads: int, kv_heads: int) -> None:
    check_case(Case(TRIANGLE, 50, 90, 1, heads, kv_heads, dim, value_dim, options=TRITON))


@pytest.mark.parametrize("offset,total", [(0, 200), (30, 200), (100, 200), (7, None)])
def test_chunked_prefill(offset: int, total: int | None) -> None:
    check_case(Case(TRIANGLE, 50, offset + 50, q_offset=offset, total_len=total, options=TRITON))


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.5])
def test_scale(scale: float) -> None:
    check_case(Case(TRIANGLE, 60, 60, scale=scale, options=TRITON))


@pytest.mark.parametrize("tile", [(16, 16), (64, 16), (16, 64)])
def test_tiles(tile: tuple[int, int]) -> None:
    check_case(Case(TRIANGLE | Chunk(24), 100, 100, dim=16, options={**TRITON, "tile": tile}))


@settings(max_examples=40, deadline=None)
@given(masks(), shapes(max_len=90))
def test_random_masks(mask: Mask, shape: Shape) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        check_case(Case(mask, shape.q_len, shape.kv_len, dim=16, causal=False,
                        q_offset=shape.q_offset, total_len=shape.total_len,
                        options={**TRITON, "tile": (16, 16)}))


def test_layout_and_strides() -> None:
    case = Case(TRIANGLE, 70, 70, 2, 4, 2, 32, options=TRITON)
    q, k, v = make_inputs(case, "cpu")
    expected = maskdsl.compile(TRIANGLE, backend="triton")(q, k, v)
    blhd = maskdsl.compile(TRIANGLE, backend="triton", layout="blhd")
    out = blhd(*(t.transpose(1, 2).contiguous() for t in (q, k, v)))
    assert torch.equal(out.transpose(1, 2), expected)
    odd = torch.zeros(2, 2, 70, 37)[..., 1:33]
    odd.copy_(k)
    assert torch.equal(maskdsl.compile(TRIANGLE, backend="triton")(q, odd, v), expected)
    shared = k[:, :1].expand(-1, 2, -1, -1)
    same = maskdsl.compile(TRIANGLE, backend="triton")(q, shared.contiguous(), v)
    assert torch.equal(maskdsl.compile(TRIANGLE, backend="triton")(q, shared, v), same)


def test_bfloat16_is_refused() -> None:
    q = torch.zeros(1, 1, 8, 16, dtype=torch.bfloat16)
    with pytest.raises(DtypeError, match="silently wrong"):
        maskdsl.compile(Causal(), backend="triton")(q, q, q)
