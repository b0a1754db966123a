"""The Hopper kernel against dense attention. Needs an H100 or H200."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hopper_marks import NEEDS_HOPPER
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
    Shape,
    Sink,
    Where,
    Window,
)
from maskdsl.codegen.hopper_cut import refuse_mask
from maskdsl.errors import BackendError
from maskdsl.simplify import simplify

pytestmark = NEEDS_HOPPER

TRIANGLE = Sink(8) | Window(512) | LastQ(128)
MASKS: list[tuple[Mask, bool]] = [
    (TRIANGLE, True),
    (Sink(64) | Window(1024) | LastQ(128), True),
    (Full(), True),
    (Full(), False),
    (Empty(), True),
    (Window(100, 30) | FirstQ(5) | Sink(3), False),
    (Window(7), True),
    (Chunk(192), True),
    (PrefixLM(130), False),
    (BlockDiagonal([700, 4000]), True),
    (Where(lambda b, h, q, k: q - k < 40 * (h + 1)), True),
    (LastQ(100) - Sink(50), True),
    (~Window(300), True),
    (LastQ(40) & Sink(600), True),
]
LENGTHS = [(1, 1), (17, 17), (1000, 1000), (1, 1000), (130, 1000), (700, 333), (2048, 2048)]
FORCED = {"backend": "hopper"}


def case_of(mask: Mask, q_len: int, kv_len: int, *sizes: int, **more: Any) -> Case:
    """A case that runs on the Hopper kernel or fails."""
    return Case(mask, q_len, kv_len, *sizes, options=FORCED, **more)


@pytest.mark.parametrize(("mask", "causal"), MASKS, ids=lambda x: repr(x)[:40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mask_and_length(mask: Mask, causal: bool, dtype: torch.dtype) -> None:
    for q_len, kv_len in LENGTHS:
        check_case(case_of(mask, q_len, kv_len, 2, 4, 2, 128, dtype=dtype, causal=causal), "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "value_dim"), [
    (16, 16), (64, 32), (40, 40), (64, 64), (72, 24), (80, 80), (96, 96), (128, 64)])
def test_head_sizes(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    check_case(case_of(TRIANGLE, 1000, 1000, 1, 4, 1, dim, value_dim, dtype=dtype), "cuda")
    check_case(case_of(Full(), 500, 700, 1, 2, 1, dim, value_dim, dtype=dtype), "cuda")


@pytest.mark.parametrize(("heads", "kv_heads"), [
    (1, 1), (3, 1), (7, 1), (14, 2), (32, 8), (6, 6), (16, 2), (12, 6)])
def test_grouped_heads(heads: int, kv_heads: int) -> None:
    check_case(case_of(TRIANGLE, 777, 777, 3, heads, kv_heads, 128, dtype=torch.bfloat16), "cuda")


@pytest.mark.parametrize("offset,total", [(0, 3000), (1000, 3000), (2500, 3000), (37, None)])
def test_chunked_prefill(offset: int, total: int | None) -> None:
    check_case(case_of(TRIANGLE, 500, offset + 500, dim=128, heads=4, dtype=torch.bfloat16,
                       q_offset=offset, total_len=total), "cuda")


@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (4, 1), (8, 2)])
def test_heavy_rows_are_cut_and_joined(heads: int, kv_heads: int) -> None:
    """Few heads and a long prompt: the last rows are split along their keys."""
    case = case_of(TRIANGLE, 8000, 8000, 1, heads, kv_heads, 128, dtype=torch.bfloat16)
    q, k, v = make_inputs(case, "cuda")
    hopper = maskdsl.compile(TRIANGLE, backend="hopper")
    portable = maskdsl.compile(TRIANGLE, backend="triton")
    (out, lse), (expected, expected_lse) = (f(q, k, v, return_lse=True) for f in (hopper, portable))
    assert (out.float() - expected.float()).abs().max() < 2e-2
    assert (lse - expected_lse).abs().max() < 2e-5
    ones = torch.zeros_like(v)
    ones[..., 0] = 1
    _, counted = hopper(q, torch.zeros_like(k), ones, return_lse=True)
    assert torch.equal(counted[0, 0, -128:].double().exp().round().long().cpu(),
                       torch.arange(8000 - 128, 8000) + 1)


@settings(max_examples=60, deadline=None)
@given(masks(), shapes(max_len=300))
def test_random_masks(mask: Mask, shape: Shape) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if refuse_mask(simplify(mask)) or not shape.q_len or not shape.kv_len:
        return
    if max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        check_case(case_of(mask, shape.q_len, shape.kv_len, 1, 4, 1, 64, dtype=torch.float16,
                           causal=False, q_offset=shape.q_offset, total_len=shape.total_len),
                   "cuda")


def test_many_launches_share_the_queue() -> None:
    """The last program of a launch resets the queue; results are the same every time."""
    case = case_of(TRIANGLE, 3000, 3000, 2, 8, 2, 128, dtype=torch.bfloat16)
    q, k, v = make_inputs(case, "cuda")
    attn = maskdsl.compile(TRIANGLE, backend="hopper")
    first = attn(q, k, v)
    for _ in range(50):
        assert torch.equal(attn(q, k, v), first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = [attn(q, k, v) for _ in range(10)]
    here = [attn(q, k, v) for _ in range(10)]
    torch.cuda.synchronize()
    assert all(torch.equal(x, first) for x in (*beside, *here))


def test_graph_capture() -> None:
    case = case_of(TRIANGLE, 2000, 2000, 1, 4, 1, 128, dtype=torch.bfloat16)
    q, k, v = make_inputs(case, "cuda")
    attn = maskdsl.compile(TRIANGLE, backend="hopper")
    attn(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn(q, k, v)
    q.normal_()
    for _ in range(3):
        graph.replay()
    assert torch.equal(out, attn(q, k, v))


def test_layouts_and_strides() -> None:
    case = case_of(TRIANGLE, 600, 600, 2, 4, 2, 64, dtype=torch.bfloat16)
    q, k, v = make_inputs(case, "cuda")
    expected = maskdsl.compile(TRIANGLE, backend="hopper")(q, k, v)
    blhd = maskdsl.compile(TRIANGLE, backend="hopper", layout="blhd")
    packed = torch.cat([q.transpose(1, 2).flatten(2), k.transpose(1, 2).flatten(2),
                        v.transpose(1, 2).flatten(2)], -1)
    cut = [t.unflatten(-1, (-1, 64)) for t in packed.split([256, 128, 128], -1)]
    assert torch.equal(blhd(*cut).transpose(1, 2), expected)


def test_what_it_does_not_take() -> None:
    """By default the portable kernel runs, and says why; asked for by name, an error is raised."""
    q, k, v = make_inputs(Case(TRIANGLE, 64, 64, dtype=torch.float32), "cuda")
    attn = maskdsl.compile(TRIANGLE)
    assert attn.backend == "hopper" and "float32" in attn.refusal(q, k, v)
    attn(q, k, v)
    with pytest.raises(BackendError, match="float32"):
        maskdsl.compile(TRIANGLE, backend="hopper")(q, k, v)
    half = [t.to(torch.bfloat16) for t in (q, k, v)]
    assert attn.refusal(*half) == ""
    assert maskdsl.compile(Causal() & Window(8), backend="triton").refusal(*half)


@pytest.mark.parametrize("mask", [Sink(9) | Window(500) | LastQ(70), Full() - Sink(3)], ids=repr)
def test_one_binary_for_every_length(mask: Mask) -> None:
    attn = maskdsl.compile(mask, backend="hopper")
    forward: Any = attn._forward.hopper  # type: ignore[union-attr]
    for length, batch, heads in [(100, 1, 4), (128, 2, 8), (1, 1, 16), (777, 3, 4), (5000, 1, 32)]:
        q, k, v = make_inputs(Case(mask, length, length, batch, heads, heads // 4, 128,
                                   dtype=torch.bfloat16), "cuda")
        attn(q, k, v)
    (_, kernel), = forward.modules.values()
    assert sum(len(cache[0]) for cache in kernel.device_caches.values()) == 1
