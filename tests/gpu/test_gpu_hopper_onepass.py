"""The one-pass Hopper backward against dense autograd in float64. Needs an H100 or H200."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from gradient_oracle import check_gradients
from hopper_marks import NEEDS_HOPPER
from hypothesis import HealthCheck, given, settings
from oracle import Case, make_inputs
from strategies import masks, shapes

import maskdsl
from maskdsl import BlockDiagonal, Causal, Full, LastQ, Mask, PrefixLM, Sink, Window
from maskdsl.codegen import hopper_backward
from maskdsl.codegen.emit_hopper_onepass import fits_letter
from maskdsl.codegen.hopper_backward_cut import refuse_mask
from maskdsl.codegen.hopper_onepass import OnePass
from maskdsl.simplify import simplify

pytestmark = NEEDS_HOPPER

OPTIONS = {"backend": "hopper"}
TRIANGLE = Sink(8) | Window(512) | LastQ(128)
MASKS: list[tuple[Mask, bool]] = [
    (Full(), True), (Full(), False), (TRIANGLE, True), (Window(100, 30) | Sink(3), False),
    (PrefixLM(130), False), (BlockDiagonal([700, 4000]), True), (~Window(300), True),
]
LENGTHS = [(1, 1), (17, 17), (1000, 1000), (130, 1000), (700, 333), (2048, 2048)]
Leaves = list[torch.Tensor]


@pytest.fixture
def one_pass(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every call in one pass; returns the calls so far."""
    calls: list[Any] = []
    launch = hopper_backward.OnePassKernel.__call__
    monkeypatch.setattr(hopper_backward, "pays", lambda *_: True)
    monkeypatch.setattr(hopper_backward.OnePassKernel, "__call__",
                        lambda *a: (calls.append(a[1].shape), launch(*a))[1])
    return calls


@pytest.mark.parametrize(("mask", "causal"), MASKS, ids=lambda x: repr(x)[:40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mask_and_length(one_pass: list[Any], mask: Mask, causal: bool,
                         dtype: torch.dtype) -> None:
    for q_len, kv_len in LENGTHS:
        check_gradients(Case(mask, q_len, kv_len, 2, 4, 2, 128, dtype=dtype, causal=causal,
                             options=OPTIONS), "cuda")
    assert len(one_pass) >= len(LENGTHS)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (7, 1), (14, 2), (32, 8), (6, 6)])
def test_grouped_heads(one_pass: list[Any], heads: int, kv_heads: int) -> None:
    check_gradients(Case(Full(), 777, 777, 2, heads, kv_heads, 128, dtype=torch.bfloat16,
                         options=OPTIONS), "cuda")
    assert one_pass


@settings(max_examples=12, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(masks(), shapes(max_len=300))
def test_random_masks(one_pass: list[Any], mask: Mask, shape: maskdsl.Shape) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    whole = simplify(mask)
    if refuse_mask(whole) or not fits_letter(OnePass(whole).by_key) or \
            max(shape.q_offset + shape.q_len, shape.kv_len) > limit:
        return
    check_gradients(Case(mask, shape.q_len, shape.kv_len, dim=128, causal=False,
                         dtype=torch.float16, q_offset=shape.q_offset,
                         total_len=shape.total_len, options=OPTIONS), "cuda")


def gradients(attn: Any, leaves: Leaves, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(attn(*leaves), leaves, weight)


def inputs(length: int, heads: int = 32, kv_heads: int = 8) -> tuple[Leaves, torch.Tensor]:
    """Leaves of a dense call, and an output's gradient."""
    tensors = make_inputs(Case(Full(), length, length, 1, heads, kv_heads, 128,
                               dtype=torch.bfloat16), "cuda")
    return [t.requires_grad_() for t in tensors], torch.randn_like(tensors[0])


def assert_close(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        gap = (a.float() - b.float()).norm() / b.float().norm()
        assert gap < 5e-3, gap


@pytest.mark.parametrize("mask", [Causal(), Full() - Sink(5), Window(3000)], ids=repr)
def test_default_beside_the_deterministic_one(mask: Mask) -> None:
    """At a length where the default is one pass: many units, and sums used again and again."""
    leaves, weight = inputs(9000)
    exact = gradients(maskdsl.compile(mask, backward="deterministic"), leaves, weight)
    again = gradients(maskdsl.compile(mask, backward="deterministic"), leaves, weight)
    assert all(torch.equal(a, b) for a, b in zip(exact, again, strict=True))
    attn = maskdsl.compile(mask)
    for _ in range(20):
        assert_close(gradients(attn, leaves, weight), exact)


def test_it_is_the_default_for_dense_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    launch = hopper_backward.OnePassKernel.__call__
    monkeypatch.setattr(hopper_backward.OnePassKernel, "__call__",
                        lambda *a: (taken.append(1), launch(*a))[1])
    leaves, weight = inputs(8192)
    attn = maskdsl.compile(Causal())
    gradients(attn, leaves, weight)
    assert len(taken) == 1
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients(attn, leaves, weight) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(taken) == 1 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    gradients(maskdsl.compile(TRIANGLE), leaves, weight)
    assert len(taken) == 1


def test_two_streams_at_once() -> None:
    """Programs of one launch wait for others of it, some of which may find no multiprocessor
    free."""
    leaves, weight = inputs(8192)
    attn = maskdsl.compile(Causal())
    exact = gradients(maskdsl.compile(Causal(), backward="deterministic"), leaves, weight)
    streams = [torch.cuda.Stream() for _ in range(3)]
    found: list[Any] = []
    torch.cuda.synchronize()
    for _ in range(4):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(gradients(attn, leaves, weight))
    torch.cuda.synchronize()
    for one in found:
        assert_close(one, exact)


def test_in_a_graph() -> None:
    leaves, weight = inputs(8192)
    attn = maskdsl.compile(Causal())
    exact = gradients(attn, leaves, weight)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(attn, leaves, weight)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(attn, leaves, weight)
    for _ in range(3):
        for t in found:
            t.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_close(found, exact)


def test_memory() -> None:
    """Beyond inputs, output and gradients: lse, delta, and the sums, 96 MiB at 32K."""
    leaves, weight = inputs(32768)
    attn = maskdsl.compile(Causal())
    gradients(attn, leaves, weight)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(attn, leaves, weight)
    known = leaves[0].nbytes + sum(t.nbytes for t in leaves) + 2 * 4 * 32 * 32768
    assert torch.cuda.max_memory_allocated() - before <= known + (97 << 20)
