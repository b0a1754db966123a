"""The portable gradients on a real GPU, against dense autograd in float64. Needs CUDA.

Nearly all of the time is ptxas: about ten seconds for each mask, dtype and head size. So `pytest -n
12` pays, and random tests come in parts, which run side by side.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from dynamic_strategies import BATCH, HEADS, KV_HEADS, dynamic_masks, per_head_masks, slot_data
from gradient_oracle import check_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, make_inputs
from score_oracle import make_data, some_mods
from strategies import masks, shapes

import maskdsl
from maskdsl import (
    ALiBi,
    Bias,
    BlockDiagonal,
    BlockIndices,
    Blocks,
    Causal,
    Chunk,
    Columns,
    Document,
    Documents,
    Empty,
    FirstQ,
    Full,
    LastQ,
    Mask,
    PerHead,
    PrefixLM,
    RandomBlocks,
    RelativePosition,
    Shape,
    Sink,
    SinkLogits,
    Softcap,
    Stride,
    TokenIndices,
    TokenTopK,
    VerticalSlash,
    VSIndices,
    Where,
    Window,
)
from maskdsl.codegen import backward_cut
from maskdsl.codegen.backward import GradientKernels, backward_of
from maskdsl.scores import ScoreMod

pytestmark = pytest.mark.gpu

OPTIONS = {"backend": "triton"}
TRIANGLE = Sink(8) | Window(512) | LastQ(128)
MASKS: list[tuple[Mask, bool]] = [
    (TRIANGLE, True), (Full(), True), (Full(), False), (Empty(), True),
    (Window(100, 30) | FirstQ(5) | Sink(3), False), (Chunk(192) | Stride(128, 5), True),
    (PrefixLM(130), False), (RandomBlocks(64, 2, seed=1) | Window(128), True),
    (BlockDiagonal([300, 500, 1200, 4000]), True), (~Window(300), True),
    (Where(lambda b, h, q, k: q - k < 40 * (h + 1)), True),
]
LENGTHS = [(1, 1), (17, 17), (1000, 1000), (1, 1000), (130, 1000), (700, 333), (1500, 1500)]


def mask_name(value: Any) -> str:
    """A test's name: the same in every process, which the address of a function is not."""
    return repr(value)[:30] if isinstance(value, Mask) else "data"


@pytest.mark.parametrize(("mask", "causal"), MASKS, ids=lambda x: repr(x)[:40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mask_and_length(mask: Mask, causal: bool, dtype: torch.dtype) -> None:
    """Lengths in fours and not: rows' numbers come through TMA and through pointers."""
    for q_len, kv_len in LENGTHS:
        check_gradients(Case(mask, q_len, kv_len, 2, 4, 2, 64, dtype=dtype, causal=causal,
                             options=OPTIONS), "cuda")


@pytest.mark.parametrize("backend", [None, "triton"])
def test_backends(backend: str | None) -> None:
    """The default, which may be the Hopper kernels (tests/gpu/test_gpu_hopper_backward.py)."""
    for q_len, kv_len in LENGTHS:
        check_gradients(Case(TRIANGLE, q_len, kv_len, 2, 4, 2, 64, dtype=torch.float16,
                             options={"backend": backend}), "cuda")


@pytest.mark.parametrize(("dim", "value_dim", "dtype"), [
    *((d, dv, torch.bfloat16) for d, dv in (
        (16, 16), (32, 64), (40, 40), (72, 24), (80, 80), (128, 128), (192, 128), (256, 256),
        (17, 33))),
    (128, 128, torch.float16), (128, 128, torch.float32), (256, 256, torch.float32),
    (24, 40, torch.float32)])
def test_head_sizes(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    check_gradients(Case(TRIANGLE, 1000, 1000, 1, 2, 1, dim, value_dim, dtype, options=OPTIONS),
                    "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_masks_take_larger_tiles(dtype: torch.dtype) -> None:
    check_gradients(Case(Full(), 500, 700, 1, 4, 2, 128, dtype=dtype, options=OPTIONS), "cuda")


@pytest.mark.parametrize(("mask", "made"), [
    (TRIANGLE, lambda: {}), (VerticalSlash("vs") | TRIANGLE, lambda: {"vs": VSIndices(
        numbers(1, 2, 40, most=5000), numbers(1, 2, 10, most=5000))})], ids=mask_name)
def test_long_tiles_are_cut(mask: Mask, made: Any) -> None:
    """The sinks' keys and the last rows, in parts that are added up; a ragged length."""
    seen = []
    real = GradientKernels.cut
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientKernels, "cut", lambda self, *args: (
            seen.append(real(self, *args)), seen[-1])[1])
        patch.setattr(backward_cut, "SHARE", 0.01)
        backward_of.cache_clear()
        check_gradients(Case(mask, 5003, 5003, 1, 2, 1, 64, dtype=torch.bfloat16, slots=made(),
                             options=OPTIONS), "cuda")
    backward_of.cache_clear()
    assert seen[0][1].parts > 2


@pytest.mark.parametrize("length", [1000, 1001])
def test_gradients_that_are_no_tiles(length: int) -> None:
    """Of stride 0, turned round, and a slice of a larger tensor: no copy by TMA, the same bits."""
    leaves = [t.requires_grad_() for t in make_inputs(
        Case(TRIANGLE, length, length, 2, 4, 2, 64, dtype=torch.bfloat16), "cuda")]
    out = maskdsl.compile(TRIANGLE, **OPTIONS)(*leaves)
    plain = torch.randn_like(out)
    wide = torch.zeros(2, 4, length, 67, device="cuda", dtype=out.dtype)
    wide[..., 1:65] = plain
    turned = plain.transpose(1, 2).contiguous().transpose(1, 2)
    column = plain.transpose(2, 3).contiguous().transpose(2, 3)
    want = torch.autograd.grad(out, leaves, plain, retain_graph=True)
    for grad in (wide[..., 1:65], turned, column):
        for a, b in zip(torch.autograd.grad(out, leaves, grad, retain_graph=True), want,
                        strict=True):
            torch.testing.assert_close(a, b, atol=1e-2, rtol=2e-2)
    flat = torch.autograd.grad(out, leaves, torch.ones(1, device="cuda", dtype=out.dtype)
                               .expand_as(out), retain_graph=True)
    for a, b in zip(flat, torch.autograd.grad(out, leaves, torch.ones_like(out)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=2e-2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (7, 1), (14, 2), (32, 8), (6, 6)])
def test_grouped_heads(heads: int, kv_heads: int) -> None:
    check_gradients(Case(TRIANGLE, 777, 777, 2, heads, kv_heads, 128, dtype=torch.bfloat16,
                         options=OPTIONS), "cuda")


PARTS = pytest.mark.parametrize("part", range(4))


@PARTS
@settings(max_examples=5, deadline=None)
@given(mask=masks(), shape=shapes(max_len=200))
def test_random_masks(part: int, mask: Mask, shape: Shape) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        check_gradients(Case(mask, shape.q_len, shape.kv_len, dim=32, causal=False,
                             dtype=torch.float16, q_offset=shape.q_offset,
                             total_len=shape.total_len, options=OPTIONS), "cuda")


def test_the_same_bits_every_time() -> None:
    tensors = make_inputs(Case(TRIANGLE, 3000, 3000, 1, 8, 2, 128, dtype=torch.bfloat16), "cuda")
    attn = maskdsl.compile(TRIANGLE, **OPTIONS)
    leaves = [t.requires_grad_() for t in tensors]
    first, second = (torch.autograd.grad(attn(*leaves).square().sum(), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory() -> None:
    """Beyond inputs, output and gradients: lse, delta and the output's gradient, at 128K."""
    n, heads = 131072, 4
    leaves = [t.requires_grad_() for t in make_inputs(
        Case(TRIANGLE, n, n, 1, heads, 1, 128, dtype=torch.bfloat16), "cuda")]
    attn = maskdsl.compile(TRIANGLE, **OPTIONS)
    grad = torch.ones(1, heads, n, 128, device="cuda", dtype=torch.bfloat16)
    attn(*leaves).backward(grad)
    for t in leaves:
        t.grad = None
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attn(*leaves)
    out.backward(grad)
    known = sum(t.nbytes for t in (*leaves, out)) + 2 * 4 * heads * n
    assert torch.cuda.max_memory_allocated() - before <= known + (8 << 20)


def test_a_long_triangle_agrees_with_itself_by_rows() -> None:
    """32K: the last rows' dq, computed alone against all keys."""
    n = 32768
    q, k, v = make_inputs(Case(TRIANGLE, n, n, 1, 2, 1, 128, dtype=torch.bfloat16), "cuda")
    attn = maskdsl.compile(Causal() & TRIANGLE, causal=False, **OPTIONS)
    whole = q.clone().requires_grad_()
    attn(whole, k, v).sum().backward()
    last = q[:, :, -300:].clone().requires_grad_()
    attn(last, k, v).sum().backward()
    assert whole.grad is not None and last.grad is not None
    torch.testing.assert_close(whole.grad[:, :, -300:], last.grad, atol=2e-3, rtol=2e-2)


# --- runtime slots, kinds of heads, score modifiers -----------------------------------------------


def moved(data: Any) -> Any:
    """Call-time data on the GPU."""
    for name, value in vars(data).items():
        if isinstance(value, torch.Tensor):
            object.__setattr__(data, name, value.cuda())
    return data


def check_random(drawn: st.DataObject, mask: Mask, shape: Shape, **more: Any) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        slots = {name: moved(value) for name, value in drawn.draw(slot_data(mask, shape)).items()}
        check_gradients(Case(mask, shape.q_len, shape.kv_len, BATCH, HEADS, KV_HEADS, 32,
                             causal=False, dtype=torch.float16, q_offset=shape.q_offset,
                             total_len=shape.total_len, options=OPTIONS,
                             slots=slots, **more), "cuda")


@PARTS
@settings(max_examples=3, deadline=None)
@given(data=st.data(), mask=dynamic_masks(), shape=shapes(max_len=200))
def test_random_slots(part: int, data: st.DataObject, mask: Mask, shape: Shape) -> None:
    check_random(data, mask, shape)


@PARTS
@settings(max_examples=2, deadline=None)
@given(data=st.data(), mask=st.one_of(per_head_masks(), dynamic_masks(3)),
       shape=shapes(max_len=150), mods=some_mods(),
       lead=st.sampled_from([(1, 1), (BATCH, HEADS), (1, HEADS)]))
def test_random_scores_and_heads(part: int, data: st.DataObject, mask: Mask, shape: Shape,
                                 mods: Any, lead: tuple[int, int]) -> None:
    check_random(data, mask, shape, scores=mods, data=make_data(mods, shape, 0, lead))


def numbers(*size: int, most: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(size) + most)
    return torch.randint(0, most, size, generator=generator).to("cuda", torch.int32)


N = 1500
DYNAMIC: list[tuple[Mask, Any]] = [
    (VerticalSlash("vs") | TRIANGLE, lambda: {"vs": VSIndices(numbers(1, 4, 40, most=N),
                                                              numbers(1, 4, 30, most=N))}),
    (Blocks("b", 128, 128) | Window(64), lambda: {"b": BlockIndices.from_topk(
        numbers(1, 2, 12, 3, most=12), 128, 128)}),
    (Columns("c") | Window(128), lambda: {"c": numbers(1, 4, 50, most=N)}),
    (TokenTopK("t"), lambda: {"t": TokenIndices(numbers(1, 2, N, 32, most=N))}),
    (Document("doc"), lambda: {"doc": Documents.from_ids(torch.arange(N, device="cuda") // 400)}),
    (PerHead([Window(64), Causal(), VerticalSlash("vs"), TRIANGLE]), lambda: {"vs": VSIndices(
        numbers(1, 4, 40, most=N), numbers(1, 4, 30, most=N))}),
]


@pytest.mark.parametrize(("mask", "made"), DYNAMIC, ids=mask_name)
@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 64), (torch.bfloat16, 128),
                                            (torch.float32, 64)])
def test_slots(mask: Mask, made: Any, dtype: torch.dtype, dim: int) -> None:
    check_gradients(Case(mask, N, N, 1, 4, 2, dim, dtype=dtype, options=OPTIONS, slots=made()),
                    "cuda")


@pytest.mark.parametrize("mod", [Softcap(5.0), ALiBi(), Bias("bias"),
                                 RelativePosition("table", 100), SinkLogits("sinks")], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_modifier(mod: ScoreMod, dtype: torch.dtype) -> None:
    data = make_data((mod,), Shape(900, 900), 0, (1, 4))
    check_gradients(Case(TRIANGLE, 900, 900, 1, 4, 2, 64, dtype=dtype, scores=(mod,), data=data,
                         options=OPTIONS), "cuda")


def test_the_same_bits_with_lists_and_modifiers() -> None:
    mods = (Bias("bias"), RelativePosition("table", 100), SinkLogits("sinks"))
    leaves = [t.requires_grad_() for t in make_inputs(
        Case(TRIANGLE, 1000, 1000, 1, 4, 2, 64, dtype=torch.bfloat16), "cuda")]
    data = {name: t.cuda().requires_grad_() for name, t in
            make_data(mods, Shape(1000, 1000), 0, (1, 1)).items()}
    mask, made = DYNAMIC[0]
    attn = maskdsl.compile(mask, scores=mods, **OPTIONS)
    wanted = [*leaves, *data.values()]
    first, second = (torch.autograd.grad(attn(*leaves, **data, **made()).square().sum(), wanted)
                     for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_in_a_graph() -> None:
    mask, made = DYNAMIC[0]
    attn = maskdsl.compile(mask, **OPTIONS)
    lists = made()
    leaves = [t.requires_grad_() for t in make_inputs(
        Case(TRIANGLE, N, N, 1, 4, 2, 64, dtype=torch.bfloat16), "cuda")]
    run = torch.compile(lambda q, k, v: attn(q * 2, k, v, **lists).float().square().sum(),
                        fullgraph=True)
    found = torch.autograd.grad(run(*leaves), leaves)
    out = attn(leaves[0] * 2, *leaves[1:], **lists).float().square().sum()
    for a, b in zip(found, torch.autograd.grad(out, leaves), strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
