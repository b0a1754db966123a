"""The laws on a real GPU: every kernel path against dense attention. Needs CUDA."""

from __future__ import annotations

import gc
import weakref

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
    Dilated,
    Empty,
    FirstQ,
    Full,
    LastQ,
    Mask,
    PrefixLM,
    RandomBlocks,
    Sink,
    Slash,
    Stride,
    Vertical,
    Where,
    Window,
)
from maskdsl.errors import GradientError, ResourceError

pytestmark = pytest.mark.gpu

TRIANGLE = Sink(8) | Window(512) | LastQ(128)
MASKS: list[tuple[Mask, bool]] = [
    (TRIANGLE, True),
    (Full(), True),
    (Full(), False),
    (Empty(), True),
    (Window(100, 30) | FirstQ(5) | Sink(3), False),
    (Chunk(192) | Stride(128, 5), True),
    (PrefixLM(130), False),
    (RandomBlocks(64, 2, seed=1) | Window(128), True),
    (Dilated(20, 3), True),
    (Slash(tuple(range(0, 900, 37))) | Vertical(tuple(range(0, 1000, 91))), True),
    (BlockDiagonal([300, 500, 1200, 4000]), True),
    (Where(lambda b, h, q, k: q - k < 40 * (h + 1)), True),
    (LastQ(100) - Sink(50), True),
    (~Window(300), True),
]
LENGTHS = [(1, 1), (17, 17), (1000, 1000), (1, 1000), (130, 1000), (700, 333), (2048, 2048)]


@pytest.mark.parametrize(("mask", "causal"), MASKS, ids=lambda x: repr(x)[:40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mask_and_length(mask: Mask, causal: bool, dtype: torch.dtype) -> None:
    for q_len, kv_len in LENGTHS:
        check_case(Case(mask, q_len, kv_len, 2, 4, 2, 64, dtype=dtype, causal=causal), "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("dim", "value_dim"), [
    (16, 16), (32, 64), (40, 40), (64, 64), (72, 24), (80, 80), (96, 96), (128, 128), (192, 128),
    (200, 200), (256, 256), (17, 33)])
def test_head_sizes(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    check_case(Case(TRIANGLE, 1000, 1000, 1, 2, 1, dim, value_dim, dtype), "cuda")
    check_case(Case(Full(), 500, 700, 1, 2, 1, dim, value_dim, dtype), "cuda")


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (7, 1), (14, 2), (32, 8), (6, 6)])
def test_grouped_heads(heads: int, kv_heads: int) -> None:
    check_case(Case(TRIANGLE, 777, 777, 3, heads, kv_heads, 128, dtype=torch.bfloat16), "cuda")


@pytest.mark.parametrize("offset,total", [(0, 3000), (1000, 3000), (2500, 3000), (37, None)])
def test_chunked_prefill(offset: int, total: int | None) -> None:
    case = Case(TRIANGLE, 500, offset + 500, heads=4, dim=128, dtype=torch.bfloat16,
                q_offset=offset, total_len=total)
    check_case(case, "cuda")


def test_chunks_equal_the_whole() -> None:
    case = Case(TRIANGLE, 4097, 4097, heads=4, kv_heads=2, dim=128, dtype=torch.bfloat16)
    q, k, v = make_inputs(case, "cuda")
    attn = maskdsl.compile(TRIANGLE)
    whole = attn(q, k, v)
    parts = [attn(q[:, :, a:a + 1000], k[:, :, :a + 1000], v[:, :, :a + 1000], total_len=4097,
                  q_offset=a) for a in range(0, 4097, 1000)]
    assert (torch.cat(parts, 2).float() - whole.float()).abs().max() < 2e-2


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.5])
def test_scale(scale: float) -> None:
    check_case(Case(TRIANGLE, 900, 900, dim=64, dtype=torch.bfloat16, scale=scale), "cuda")


@pytest.mark.parametrize("tile", [(128, 64), (64, 128), (128, 128), (16, 16), (32, 64)])
def test_tiles(tile: tuple[int, int]) -> None:
    check_case(Case(TRIANGLE | Chunk(96), 1000, 1000, dim=64, dtype=torch.float16,
                    options={"tile": tile}), "cuda")


@settings(max_examples=40, deadline=None)
@given(masks(), shapes(max_len=300))
def test_random_masks(mask: Mask, shape: maskdsl.Shape) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        check_case(Case(mask, shape.q_len, shape.kv_len, dtype=torch.float16, causal=False,
                        q_offset=shape.q_offset, total_len=shape.total_len), "cuda")


def test_layouts_and_strides_without_copies() -> None:
    case = Case(TRIANGLE, 600, 600, 2, 4, 2, 64, dtype=torch.bfloat16)
    q, k, v = make_inputs(case, "cuda")
    expected = maskdsl.compile(TRIANGLE)(q, k, v)
    blhd = maskdsl.compile(TRIANGLE, layout="blhd")
    out = blhd(*(t.transpose(1, 2).contiguous() for t in (q, k, v)))
    assert torch.equal(out.transpose(1, 2), expected)
    packed = torch.cat([q.transpose(1, 2).flatten(2), k.transpose(1, 2).flatten(2),
                        v.transpose(1, 2).flatten(2)], -1)
    cut = [t.unflatten(-1, (-1, 64)) for t in packed.split([256, 128, 128], -1)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert torch.equal(blhd(*cut).transpose(1, 2), expected)
    assert torch.cuda.max_memory_allocated() - before <= 2 * expected.nbytes
    odd = torch.zeros(2, 2, 600, 67, dtype=torch.bfloat16, device="cuda")[..., 1:65]
    odd.copy_(k)  # rows of 67 elements: not what TMA can copy
    portable = maskdsl.compile(TRIANGLE, backend="triton")
    assert torch.equal(maskdsl.compile(TRIANGLE)(q, odd, v), portable(q, k, v))
    shared = k[:, :1].expand(-1, 2, -1, -1)  # stride 0 along the heads
    same = portable(q, shared.contiguous(), v)
    assert torch.equal(maskdsl.compile(TRIANGLE)(q, shared, v), same)


def test_one_kernel_for_every_length() -> None:
    attn = maskdsl.compile(Sink(5) | Window(333) | LastQ(77), backend="triton")
    for q_len, kv_len, batch, heads in [(16, 16, 1, 1), (1, 1, 1, 1), (1000, 1000, 2, 6),
                                        (4097, 5000, 1, 3), (64, 2048, 4, 2)]:
        case = Case(Full(), q_len, kv_len, batch, heads, 1, 64, dtype=torch.bfloat16)
        attn(*make_inputs(case, "cuda"))
    (variant,) = attn._forward.variants.values()
    (caches,) = variant.forward.device_caches.values()
    assert len(caches[0]) == 1


def test_past_two_to_the_31_elements() -> None:
    length, heads, dim = 1 << 19, 33, 128
    q = torch.randn(1, heads, length, dim, dtype=torch.bfloat16, device="cuda")
    assert q.numel() > 1 << 31
    k, v = (torch.randn(1, 1, length, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = maskdsl.compile(Sink(4) | Window(64))(q, k, v)
    rows = torch.tensor([0, 63, 64, 1000, length // 2, length - 1], device="cuda")
    keys = torch.arange(length, device="cuda")
    live = (keys <= rows[:, None]) & ((keys < 4) | (rows[:, None] - keys < 64))
    exact, _ = maskdsl.dense_attention(q[:, -1:, rows].float(), k.float(), v.float(), live)
    assert (out[:, -1:, rows].float() - exact).abs().max() < 2e-2


def test_strides_past_two_to_the_31() -> None:
    case = Case(TRIANGLE, 700, 700, 2, 2, 2, 64, dtype=torch.bfloat16)
    q, k, v = make_inputs(case, "cuda")
    expected = maskdsl.compile(TRIANGLE)(q, k, v)
    room = torch.empty((1 << 31) + 2 * 700 * 64, dtype=torch.bfloat16, device="cuda")
    for use in (lambda far: (q, far(k), v), lambda far: (q, k, far(v)), lambda far: (far(q), k, v)):
        def far(t: torch.Tensor) -> torch.Tensor:
            view = room.as_strided(t.shape, (1 << 31, 700 * 64, 64, 1))
            return view.copy_(t)

        assert torch.equal(maskdsl.compile(TRIANGLE)(*use(far)), expected)


def test_a_compiled_mask_keeps_no_tensor_alive() -> None:
    attn = maskdsl.compile(TRIANGLE)
    inputs = make_inputs(Case(TRIANGLE, 512, 512, dim=64, dtype=torch.bfloat16), "cuda")
    alive = [weakref.ref(t) for t in inputs]
    attn(*inputs, return_lse=True)
    del inputs
    gc.collect()
    assert [ref() for ref in alive] == [None, None, None]


def test_a_tile_that_does_not_fit_is_told() -> None:
    q = torch.randn(1, 1, 512, 256, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ResourceError, match="smaller tile"):
        maskdsl.compile(Causal(), tile=(256, 256))(q, q, q)


def test_empty_calls() -> None:
    attn = maskdsl.compile(Causal())
    q = torch.randn(1, 2, 0, 64, device="cuda", dtype=torch.bfloat16)
    assert attn(q, q, q).shape == (1, 2, 0, 64)
    some = torch.randn(1, 2, 5, 64, device="cuda", dtype=torch.bfloat16)
    out, lse = attn(some, q, q, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_gradients_can_be_forbidden() -> None:
    q = torch.randn(1, 1, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    attn = maskdsl.compile(Causal(), backward=False)
    with pytest.raises(GradientError, match="backward=False"):
        attn(q, q, q)
    with torch.no_grad():
        attn(q, q, q)
