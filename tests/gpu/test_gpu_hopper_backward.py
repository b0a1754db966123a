"""The Hopper backward against dense autograd in float64. Needs an H100 or H200."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from gradient_oracle import check_gradients
from hopper_marks import NEEDS_HOPPER
from hypothesis import given, settings
from oracle import Case, make_inputs
from strategies import masks, shapes

import maskdsl
from maskdsl import (
    BlockDiagonal,
    Chunk,
    Empty,
    FirstQ,
    Full,
    LastQ,
    Mask,
    PrefixLM,
    Shape,
    Sink,
    Window,
)
from maskdsl.codegen.hopper_backward_cut import refuse_mask
from maskdsl.simplify import simplify

pytestmark = NEEDS_HOPPER

OPTIONS = {"backend": "hopper"}
TRIANGLE = Sink(8) | Window(512) | LastQ(128)
MASKS: list[tuple[Mask, bool]] = [
    (TRIANGLE, True), (Full(), True), (Full(), False), (Empty(), True),
    (Window(100, 30) | FirstQ(5) | Sink(3), False), (Window(7), True), (Chunk(192), True),
    (PrefixLM(130), False), (BlockDiagonal([700, 4000]), True), (LastQ(100) - Sink(50), True),
    (~Window(300), True), (LastQ(40) & Sink(600), True),
]
LENGTHS = [(1, 1), (17, 17), (1000, 1000), (1, 1000), (130, 1000), (700, 333), (2048, 2048)]


def case_of(mask: Mask, q_len: int, kv_len: int, *sizes: int, **more: Any) -> Case:
    """A case for the Hopper kernels."""
    return Case(mask, q_len, kv_len, *sizes, options=OPTIONS, **more)


def compiled(mask: Mask, *tensors: torch.Tensor) -> Any:
    """The mask compiled; fails where the Hopper backward would not compute the gradients."""
    attn = maskdsl.compile(mask, **OPTIONS)  # type: ignore[arg-type]
    assert attn.refusal(*tensors, backward=True) == ""
    return attn


@pytest.mark.parametrize(("mask", "causal"), MASKS, ids=lambda x: repr(x)[:40])
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float16), (128, torch.bfloat16)])
def test_mask_and_length(mask: Mask, causal: bool, dim: int, dtype: torch.dtype) -> None:
    assert not refuse_mask(simplify(mask)), mask
    for q_len, kv_len in LENGTHS:
        check_gradients(case_of(mask, q_len, kv_len, 2, 4, 2, dim, dtype=dtype, causal=causal),
                        "cuda")


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (7, 1), (14, 2), (32, 8), (6, 6)])
def test_grouped_heads(heads: int, kv_heads: int) -> None:
    check_gradients(case_of(TRIANGLE, 777, 777, 2, heads, kv_heads, 128, dtype=torch.bfloat16),
                    "cuda")


@settings(max_examples=12, deadline=None)
@given(masks(), shapes(max_len=300))
def test_random_masks(mask: Mask, shape: Shape) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if refuse_mask(simplify(mask)) or max(shape.q_offset + shape.q_len, shape.kv_len) > limit:
        return
    check_gradients(case_of(mask, shape.q_len, shape.kv_len, dim=64, causal=False,
                            dtype=torch.float16, q_offset=shape.q_offset,
                            total_len=shape.total_len), "cuda")


@pytest.mark.parametrize("mask", [TRIANGLE, Full(), Sink(200) | Window(64)], ids=repr)
def test_many_items_a_program_and_cut_items(mask: Mask) -> None:
    """Long enough that programs take several items and heavy tiles are cut, beside the portable
    kernels on the same tensors."""
    tensors = make_inputs(Case(mask, 9000, 9000, 1, 32, 8, 128, dtype=torch.bfloat16), "cuda")
    weight = torch.randn_like(tensors[0])
    found = []
    for attn in (compiled(mask, *tensors), maskdsl.compile(mask, backend="triton")):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        found.append(torch.autograd.grad((attn(*leaves) * weight).sum(), leaves))
    for ours, theirs in zip(*found, strict=True):
        gap = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert gap < 5e-3, gap


def test_it_is_the_default() -> None:
    """Where it takes a call; other calls go to the portable kernels without a word."""
    q, k, v = make_inputs(Case(TRIANGLE, 600, 600, 1, 4, 2, 64, dtype=torch.float16), "cuda")
    attn = maskdsl.compile(TRIANGLE)
    assert attn.refusal(q, k, v, backward=True) == ""
    found = []
    for one in (attn, compiled(TRIANGLE, q, k, v)):
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        found.append(torch.autograd.grad(one(*leaves).square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    narrow = [t[..., :32].contiguous().requires_grad_() for t in (q, k, v)]
    assert "head dimensions 32" in attn.refusal(*narrow, backward=True)
    attn(*narrow).sum().backward()
    assert all(t.grad is not None for t in narrow)


def test_strides_and_layout() -> None:
    """Heads beside each other in one row, as a projection leaves them."""
    rows = torch.randn(2, 500, 8 * 64, device="cuda", dtype=torch.float16)
    q = rows.view(2, 500, 8, 64)[:, :, :4]
    k, v = rows.view(2, 500, 8, 64)[:, :, 4:6], rows.view(2, 500, 8, 64)[:, :, 6:]
    attn = maskdsl.compile(Window(100), layout="blhd", **OPTIONS)  # type: ignore[arg-type]
    plain = maskdsl.compile(Window(100), layout="blhd", backend="triton")
    assert attn.refusal(q, k, v, backward=True) == ""
    found = []
    for one in (attn, plain):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        found.append(torch.autograd.grad(one(*leaves).square().sum(), leaves))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-2)


def test_the_same_bits_every_time() -> None:
    tensors = make_inputs(Case(TRIANGLE, 6000, 6000, 1, 8, 2, 128, dtype=torch.bfloat16), "cuda")
    attn = compiled(TRIANGLE, *tensors)
    leaves = [t.requires_grad_() for t in tensors]
    first = torch.autograd.grad(attn(*leaves).square().sum(), leaves)
    for _ in range(5):
        again = torch.autograd.grad(attn(*leaves).square().sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_memory() -> None:
    """Beyond inputs, output and gradients: lse, delta, and parts of cut items (at most 64 MiB for
    each result), at 128K."""
    n, heads = 131072, 4
    leaves = [t.requires_grad_() for t in make_inputs(
        Case(TRIANGLE, n, n, 1, heads, 1, 128, dtype=torch.bfloat16), "cuda")]
    attn = compiled(TRIANGLE, *leaves)
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
    assert torch.cuda.max_memory_allocated() - before <= known + (136 << 20)
