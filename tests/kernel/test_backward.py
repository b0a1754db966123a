"""The gradients' kernels in Triton's interpreter, against dense autograd in float64."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from gradient_oracle import check_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, make_inputs
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
    QueryRange,
    RandomBlocks,
    Shape,
    Sink,
    SinkLogits,
    Stride,
    Vertical,
    Where,
    Window,
)
from maskdsl.codegen.backward import TritonBackward
from maskdsl.codegen.kernel import interpreting
from maskdsl.errors import GradientError

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU is here: see tests/gpu")

OPTIONS = {"backend": "triton", "tile": (16, 16)}
TRIANGLE = Sink(4) | Window(20) | LastQ(10)
MASKS: list[tuple[Mask, bool]] = [
    (TRIANGLE, True), (Full(), True), (Full(), False), (Empty(), True), (Window(9, 30), False),
    (Chunk(24) | Sink(2), True), (PrefixLM(33), False), (Causal() & Stride(64, 5), False),
    (RandomBlocks(16, 2, seed=1), False), (Vertical((1, 40, 41)) | FirstQ(5), True),
    (BlockDiagonal([30, 50, 400]), True), (Where(lambda b, h, q, k: q - k < 9 * (h + 1)), True),
    (~Window(30), True), (QueryRange(10, 20) & Full(), False),
]


@pytest.mark.parametrize(("mask", "causal"), MASKS, ids=lambda x: repr(x)[:40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_mask(mask: Mask, causal: bool, dtype: torch.dtype) -> None:
    case = Case(mask, 45, 45, 1, 2, 1, 16, dtype=dtype, causal=causal, options=OPTIONS)
    if dtype == torch.float32:
        check_gradients(case)
    check_gradients(replace(case, q_len=20, kv_len=40), with_lse=False)


@settings(max_examples=8)
@given(masks(), shapes(max_len=60), st.sampled_from([torch.float16, torch.float32]),
       st.booleans(), st.sampled_from([(2, 1), (2, 2)]),
       st.sampled_from([(16, 16), (32, 16), (16, 32)]))
def test_random_masks(mask: Mask, shape: Shape, dtype: torch.dtype, with_lse: bool,
                      heads: tuple[int, int], tile: tuple[int, int]) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        check_gradients(Case(
            mask, shape.q_len, shape.kv_len, 1, *heads, dim=16, causal=False, dtype=dtype,
            q_offset=shape.q_offset, total_len=shape.total_len,
            options={**OPTIONS, "tile": tile}), with_lse=with_lse)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "value_dim"), [
    (3, 1, 16, 16), (7, 1, 24, 40), (4, 2, 40, 24), (1, 1, 80, 32)])
def test_heads_and_sizes(heads: int, kv_heads: int, dim: int, value_dim: int) -> None:
    check_gradients(Case(TRIANGLE, 21, 40, 1, heads, kv_heads, dim, value_dim, options=OPTIONS))


@pytest.mark.parametrize("offset,total", [(0, 200), (30, 200), (7, None)])
def test_chunked_prefill(offset: int, total: int | None) -> None:
    check_gradients(Case(TRIANGLE, 40, offset + 40, q_offset=offset, total_len=total, dim=16,
                         options=OPTIONS))


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.5])
def test_scale(scale: float) -> None:
    check_gradients(Case(TRIANGLE, 40, 40, dim=16, scale=scale, options=OPTIONS))


@pytest.mark.parametrize("lengths", [(1, 1), (0, 5), (5, 0), (1, 40), (40, 1), (50, 20)])
def test_short_calls_and_dead_rows(lengths: tuple[int, int]) -> None:
    check_gradients(Case(Window(8), *lengths, dim=16, options=OPTIONS))


def test_default_tile() -> None:
    check_gradients(Case(TRIANGLE, 70, 70, dim=16, options={"backend": "triton"}))


def gradients(attn: maskdsl.api.Attention, tensors: tuple[torch.Tensor, ...],
              turned: bool = False) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = attn(*((t.transpose(1, 2) for t in leaves) if turned else leaves))
    out = out.transpose(1, 2) if turned else out
    found = torch.autograd.grad((out * torch.arange(out.shape[3])).sum(), leaves)
    return [t.contiguous() for t in found]


def test_layout_and_strides() -> None:
    tensors = make_inputs(Case(TRIANGLE, 35, 35, 2, 2, 2, 32), "cpu")
    attn = maskdsl.compile(TRIANGLE, **OPTIONS)
    expected = gradients(attn, tensors)
    blhd = maskdsl.compile(TRIANGLE, layout="blhd", **OPTIONS)
    for got, want in zip(gradients(blhd, tensors, turned=True), expected, strict=True):
        assert torch.equal(got, want)
    odd = torch.zeros(2, 2, 35, 37)
    odd[..., 1:33] = tensors[1]
    odd.requires_grad_()
    out = attn(tensors[0], odd[..., 1:33], tensors[2])
    (out * torch.arange(32)).sum().backward()
    assert odd.grad is not None and torch.equal(odd.grad[..., 1:33], expected[1])
    shared = tensors[1][:, :1].clone().requires_grad_()
    out = attn(tensors[0], shared.expand(-1, 2, -1, -1), tensors[2])
    out.sum().backward()  # a gradient of stride 0
    whole = tensors[1][:, :1].expand(-1, 2, -1, -1).clone().requires_grad_()
    attn(tensors[0], whole, tensors[2]).sum().backward()
    assert whole.grad is not None and shared.grad is not None
    assert torch.allclose(shared.grad, whole.grad.sum(1, keepdim=True))


def test_the_same_bits_every_time() -> None:
    tensors = make_inputs(Case(TRIANGLE, 30, 30, 1, 4, 1, 16), "cpu")
    attn = maskdsl.compile(TRIANGLE, **OPTIONS)
    for a, b in zip(gradients(attn, tensors), gradients(attn, tensors), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backward", [True, "deterministic"])
def test_the_kernels_know_whether_bits_must_be_the_same(
        monkeypatch: pytest.MonkeyPatch, backward: bool | str) -> None:
    """Called eagerly, and as the operator of a graph calls them."""
    asked: list[bool] = []
    run = TritonBackward.run
    monkeypatch.setattr(TritonBackward, "run",
                        lambda *a: (asked.append(a[1].deterministic), run(*a))[1])
    tensors = make_inputs(Case(TRIANGLE, 30, 30, 1, 4, 1, 16), "cpu")
    attn = maskdsl.compile(TRIANGLE, **OPTIONS, backward=backward)
    found = gradients(attn, tensors)
    out, lse = attn(*(t.detach() for t in tensors), return_lse=True)
    again = attn.kernel_gradients((*tensors, out, lse), torch.ones_like(out), None,
                                  (None, None, None), {}, {"q", "k", "v"})
    assert asked == [backward == "deterministic"] * 2
    assert set(again) == {"q", "k", "v"} and len(found) == 3


def test_only_what_is_asked_for() -> None:
    q, k, v = make_inputs(Case(TRIANGLE, 30, 30, 1, 2, 1, 16), "cpu")
    attn = maskdsl.compile(TRIANGLE, **OPTIONS)
    expected = gradients(attn, (q, k, v))
    for i in range(3):
        leaves = [t.clone() for t in (q, k, v)]
        leaves[i].requires_grad_()
        (attn(*leaves) * torch.arange(16)).sum().backward()
        assert leaves[i].grad is not None and torch.equal(leaves[i].grad, expected[i])
        assert all(t.grad is None for j, t in enumerate(leaves) if j != i)
    _, lse = attn(q.requires_grad_(), k, v, return_lse=True)
    lse.sum().backward()  # the output has no gradient at all
    assert q.grad is not None and q.grad.abs().sum() > 0


def test_what_is_kept_from_forward_to_backward() -> None:
    """q, k, v, the output and the lse: nothing of queries times keys."""
    case = Case(TRIANGLE, 64, 64, 1, 2, 1, 16)
    q, k, v = (t.requires_grad_() for t in make_inputs(case, "cpu"))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out, lse = maskdsl.compile(TRIANGLE, **OPTIONS)(q, k, v, return_lse=True)
    gc.collect()
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in (q, k, v, out, lse))


def test_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    tensors = make_inputs(Case(TRIANGLE, 30, 30, 1, 2, 1, 16), "cpu")
    attn = maskdsl.compile(TRIANGLE, **OPTIONS)
    leaves = [t.clone().requires_grad_() for t in tensors]
    (checkpoint(attn, *leaves, use_reentrant=False) * torch.arange(16)).sum().backward()
    for leaf, want in zip(leaves, gradients(attn, tensors), strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad, want)


def test_a_second_derivative_is_told() -> None:
    q, k, v = make_inputs(Case(TRIANGLE, 20, 20, 1, 2, 1, 16), "cpu")
    attn = maskdsl.compile(TRIANGLE, **OPTIONS)
    first, = torch.autograd.grad(attn(q.requires_grad_(), k, v).sum(), q, create_graph=True)
    with pytest.raises(GradientError, match="first derivatives only"):
        first.sum().backward()


def test_it_can_be_refused() -> None:
    q, k, v = make_inputs(Case(TRIANGLE, 20, 20, 1, 2, 1, 16), "cpu")
    with pytest.raises(GradientError, match=r"(?s)compiled without gradients.*no_grad"):
        maskdsl.compile(TRIANGLE, backend="triton", backward=False)(q.requires_grad_(), k, v)
    sinks = torch.zeros(2, requires_grad=True)
    attn = maskdsl.compile(TRIANGLE, backend="triton", scores=SinkLogits("sinks"), backward=False)
    with pytest.raises(GradientError, match="backward=False"):
        attn(q.detach(), k, v, sinks=sinks)


def test_the_torch_backend_is_always_differentiable() -> None:
    q, k, v = make_inputs(Case(TRIANGLE, 20, 20, 1, 2, 1, 16), "cpu")
    maskdsl.compile(TRIANGLE, backend="torch", backward=False)(q.requires_grad_(), k, v).sum() \
        .backward()
    assert q.grad is not None
