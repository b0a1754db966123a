"""The whole kernels of the Hopper backward, warp group by warp group, on the CPU in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gluon_gradients import run_gradients
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import masks, shapes

from maskdsl import Causal, Chunk, FirstQ, Full, LastQ, Mask, Shape, Sink, Window, dense, simplify
from maskdsl.codegen.hopper_backward import constants_of, plan_launch
from maskdsl.codegen.hopper_backward_cut import (
    KeySide,
    QuerySide,
    Side,
    cut_call,
    refuse_mask,
)
from maskdsl.dense import dense_attention

Tensor = torch.Tensor
TRIANGLE = Sink(8) | Window(130) | LastQ(40)


def run_side(side: Side, shape: Shape, scale: float, tensors: tuple[Tensor, ...],
             numbers: tuple[Tensor, Tensor], processors: int, seed: int) -> tuple[Tensor, ...]:
    """The gradients one side computes: (dk, dv) or (dq,); (dk, dv, dq) where keys add.

    tensors  q, k, v and the output's gradient; numbers: lse and delta
    """
    q, k, v, grad = tensors
    by_key = isinstance(side, KeySide)
    own, passing = ((k, v), (q, grad)) if by_key else ((q, grad), (k, v))
    results = tuple(torch.full_like(t, torch.nan) for t in (own if by_key else own[:1]))
    made = plan_launch(side, shape, own, passing, results, processors)
    sums = torch.zeros_like(q)
    parts = [np.full(t.numel(), np.nan) for t in made.parts]
    first_part, second_part = parts[0], parts[-1]
    pointers = [numbers[0].numpy().ravel(), numbers[1].numpy().ravel(), first_part, second_part,
                sums.numpy().reshape(-1)]
    tiled: list[Any] = [(t.numpy(), box) for t, box in made.tiled]
    run_gradients(side.source, constants_of(side, q.shape[3]), tiled, pointers,
                  list(made.numbers(shape, scale, q.shape[1])), seed)
    cut, span = made.cut, int(side.constants["OWN_SPAN"])
    for part, result in zip(parts, results, strict=True):
        if cut.split_count:
            batch, heads, length, dim = result.shape
            whole = part.reshape(cut.splits, batch, heads, cut.split_count * span, dim).sum(0)
            start = cut.split_first * span
            rows = min(length - start, whole.shape[2])
            result[:, :, start:start + rows] = torch.from_numpy(whole[:, :, :rows])
    if by_key and side.constants["ADDS"]:
        return (*results, sums * scale)
    return results


def check(mask: Mask, shape: Shape, heads: tuple[int, int] = (4, 2), dim: int = 64,
          batch: int = 1, processors: int = 1, shift: float = 0.0) -> None:
    """All sides against dense autograd, in float64 on both sides; lse has a gradient too."""
    whole = simplify(mask)
    assert not refuse_mask(whole), mask
    generator = torch.Generator().manual_seed(shape.q_len)
    q, k, v = ((torch.randn(batch, h, n, dim, generator=generator, dtype=torch.float64) + by)
               .requires_grad_() for h, n, by in (
                   (heads[0], shape.q_len, shift), (heads[1], shape.kv_len, -shift),
                   (heads[1], shape.kv_len, 0.0)))
    scale = dim**-0.5
    out, lse = dense_attention(q, k, v, dense(whole, shape, batch, heads[0], "cpu"), scale)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    seen = torch.isfinite(lse)
    lse_grad = torch.randn(lse.shape, generator=generator, dtype=torch.float64) * seen
    loss = (out * grad).sum() + (torch.where(seen, lse, 0.0) * lse_grad).sum()
    dq, dk, dv = torch.autograd.grad(loss, (q, k, v))
    delta = torch.where(seen, (out * grad).sum(-1) - lse_grad, 0.0).detach()
    tensors = tuple(t.detach() for t in (q, k, v, grad))
    share = heads[0] // heads[1]
    sides: list[tuple[Side, tuple[Tensor, ...]]] = [
        (KeySide(whole, share), (dk, dv)), (QuerySide(whole, share), (dq,))]
    if dim == 128:
        sides.append((KeySide(whole, share, True), (dk, dv, dq)))
    for seed, (side, expected) in enumerate(sides):
        found = run_side(side, shape, scale, tensors, (lse.detach(), delta), processors, seed)
        for ours, right in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, right, atol=1e-9, rtol=1e-9, msg=lambda m, s=side:
                                       f"{s}: {m}")


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("mask", "lengths", "heads"), [
    (TRIANGLE & Causal(), (300, 300), (4, 2)), (Full() & Causal(), (200, 200), (4, 1)),
    (Window(50, 30) | FirstQ(5) | Sink(3), (150, 230), (3, 1)), (Full(), (130, 70), (2, 2)),
    ((Chunk(100) | Window(33)) & Causal(), (220, 220), (6, 1)),
    ((LastQ(40) & Sink(60)) & Causal(), (140, 140), (2, 1)), (Causal(), (1, 200), (4, 2)),
    (Causal(), (200, 90), (2, 1))], ids=lambda x: repr(x)[:40])
def test_gradients(mask: Mask, lengths: tuple[int, int], heads: tuple[int, int],
                   dim: int) -> None:
    check(mask, Shape(*lengths), heads, dim)


@pytest.mark.parametrize("dim", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_cut_items_and_batches(dim: int) -> None:
    """Tiles that are cut write parts; letters and slots go round many times."""
    mask, shape = simplify(Causal() & (Sink(100) | Window(40) | LastQ(30))), Shape(1100, 1100)
    for side in (KeySide(mask, 1), QuerySide(mask, 1)):
        assert cut_call(side, shape, 1, 1, 16, 4 * dim).splits > 1
    check(mask, shape, (1, 1), dim, 1, 16)
    check(TRIANGLE & Causal(), Shape(260, 260), (4, 2), dim, 2)


def test_keys_that_are_not_there_weigh_nothing() -> None:
    """Beyond the last key scores would be 0, and those that count are near -1000: exponentials
    overflow there, and dQ is summed over keys."""
    check(Full(), Shape(130, 200), (2, 1), 128, shift=10.0)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(masks(), shapes(max_len=260), st.sampled_from([(2, 2), (2, 1), (3, 1)]),
       st.sampled_from([64, 128]))
def test_random_masks(mask: Mask, shape: Shape, heads: tuple[int, int], dim: int) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if max(shape.q_offset + shape.q_len, shape.kv_len) > limit or refuse_mask(simplify(mask)):
        return
    if shape.q_len and shape.kv_len:
        check(mask, shape, heads, dim)
