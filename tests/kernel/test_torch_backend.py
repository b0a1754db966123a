"""The torch backend: values, gradients, opaque functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from oracle import Case, check_case, make_inputs
from strategies import masks, shapes

import maskdsl
from maskdsl import (
    Bias,
    Causal,
    Chunk,
    Full,
    LastQ,
    Mask,
    Shape,
    Sink,
    SinkLogits,
    Softcap,
    Stride,
    VerticalSlash,
    VSIndices,
    Where,
    Window,
    dense,
    dense_attention,
)
from maskdsl.codegen import torch_backend

TORCH = {"backend": "torch"}
DOCUMENTS = torch.tensor([0] * 40 + [1] * 100 + [2] * 60)


def same_document(b: Any, h: Any, q: Any, k: Any) -> Any:
    """Reads a tensor: cannot be traced."""
    return DOCUMENTS[q] == DOCUMENTS[k]


@given(masks(), shapes(max_len=300))
def test_random_masks(mask: Mask, shape: Shape) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        check_case(Case(mask, shape.q_len, shape.kv_len, dim=16, causal=False,
                        q_offset=shape.q_offset, total_len=shape.total_len, options=TORCH))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mask", [Sink(8) | Window(130) | LastQ(50), Full(),
                                  Where(lambda b, h, q, k: q - k < 40 * (h + 1 + b))])
def test_dtypes_and_heads(mask: Mask, dtype: torch.dtype) -> None:
    check_case(Case(mask, 700, 900, 2, 6, 2, 32, 48, dtype=dtype, options=TORCH))


@pytest.mark.parametrize("mask", [Where(same_document), Where(same_document) | Sink(3),
                                  Window(50) & Where(same_document), ~Where(same_document)])
def test_functions_that_cannot_be_traced(mask: Mask) -> None:
    check_case(Case(mask, 200, 200, 2, 2, 1, options=TORCH))


def test_a_window_still_bounds_an_opaque_function() -> None:
    plan = torch_backend.torch_plan(Causal() & Window(64) & Where(same_document))
    assert sum(plan.count_tiles(Shape(8192, 8192))) <= 3 * 8192 // torch_backend.BLOCK_M


def test_gradients_are_those_of_dense_attention() -> None:
    mask = Sink(4) | Window(40) | LastQ(9)
    case = Case(mask, 300, 300, 1, 4, 2, 16, dtype=torch.float32)
    inputs = [t.double().requires_grad_() for t in make_inputs(case, "cpu")]
    copies = [t.detach().clone().requires_grad_() for t in inputs]
    weight = torch.randn(1, 4, 300, 16, dtype=torch.float64)
    (maskdsl.compile(mask, backend="torch")(*inputs) * weight).sum().backward()
    live = dense(Causal() & mask, Shape(300, 300))
    (dense_attention(*copies, live)[0] * weight).sum().backward()
    for ours, theirs in zip(inputs, copies, strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-10)


@pytest.mark.parametrize("lists", [False, True])
def test_gradcheck(lists: bool) -> None:
    """First and second derivatives, by finite differences, with data of modifiers and slots."""
    mask: Mask = Sink(2) | Window(3) | LastQ(1)
    slots: dict[str, Any] = {}
    if lists:
        mask = mask | VerticalSlash("vs")
        slots["vs"] = VSIndices(torch.tensor([[[1, 3]]]), torch.tensor([[[4]]]))
    attn = maskdsl.compile(mask, backend="torch", scores=[Softcap(2.0), Bias("bias"),
                                                          SinkLogits("sinks")])
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*size, generator=generator, dtype=torch.float64, requires_grad=True)
              for size in ((1, 2, 5, 16), (1, 1, 7, 16), (1, 1, 7, 16), (1, 2, 5, 7), (2,))]

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor,
             sinks: torch.Tensor) -> Any:
        return attn(q, k, v, bias=bias, sinks=sinks, return_lse=True, **slots)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_gradients_of_dead_rows_are_finite() -> None:
    q, k, v = (torch.randn(1, 1, 40, 16, requires_grad=True) for _ in range(3))
    out = maskdsl.compile(Window(5) - Sink(8), backend="torch")(q, k, v)
    assert (out[:, :, :8] == 0).all()
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_long_rows_are_split_to_bound_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "SCORE_LIMIT", 1000)
    check_case(Case(Full(), 300, 300, 1, 2, 1, 16, options=TORCH))


def test_blhd() -> None:
    q, k, v = make_inputs(Case(Full(), 50, 50, 2, 4, 2), "cpu")
    expected = maskdsl.compile(Window(9), backend="torch")(q, k, v)
    turned = maskdsl.compile(Window(9), backend="torch", layout="blhd")
    out, lse = turned(*(t.transpose(1, 2) for t in (q, k, v)), return_lse=True)
    assert torch.equal(out.transpose(1, 2), expected) and lse.shape == (2, 4, 50)


@pytest.mark.parametrize("mask", [
    Stride(256), Stride(256, 3) | Stride(256, 4), Stride(300) - Window(100),
    Window(70) | Stride(512, 1), Chunk(512) & Stride(200)])
def test_dead_tiles_are_told_for_every_query_tile(mask: Mask) -> None:
    """The sieve asks about the tile at hand; it once asked about the first for all."""
    attn = maskdsl.compile(mask, backend="torch")
    assert attn.plan.sieve is not None
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 1000, 16) for _ in range(3))
    exact, _ = dense_attention(q, k, v, dense(attn.mask, Shape(1000, 1000)))
    assert torch.allclose(attn(q, k, v), exact, atol=1e-5)
