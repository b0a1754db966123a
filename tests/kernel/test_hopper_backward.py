"""The Hopper backward without a GPU: its small kernels in Triton's interpreter, how calls are cut,
what it refuses, and how it is asked for."""

from __future__ import annotations

import pytest
import torch

import maskdsl
from maskdsl import Causal, Full, LastQ, PerHead, Shape, Sink, Stride, VerticalSlash, Window
from maskdsl.codegen.hopper_backward import Launch, blocks_of, constants_of, plan_launch
from maskdsl.codegen.hopper_backward_cut import (
    KeySide,
    QuerySide,
    cut_call,
    refuse_dims,
    refuse_mask,
)
from maskdsl.codegen.hopper_backward_kernels import sum_parts, sum_products
from maskdsl.codegen.kernel import interpreting
from maskdsl.errors import GradientError
from maskdsl.simplify import simplify

TRIANGLE = simplify(Causal() & (Sink(8) | Window(512) | LastQ(128)))
interpreted = pytest.mark.skipif(not interpreting(), reason="a GPU is here: see tests/gpu")


@interpreted
@pytest.mark.parametrize("with_lse", [True, False])
def test_delta(with_lse: bool) -> None:
    """Rows beyond the last, strides, and a row without a live key."""
    out = torch.randn(2, 45, 3, 64, dtype=torch.float16).transpose(1, 2)
    grad = torch.randn(2, 3, 45, 64, dtype=torch.float16)
    lse, lse_grad = torch.randn(2, 3, 45), torch.randn(2, 3, 45)
    lse[1, 2, 7] = -torch.inf
    delta = torch.full((2, 3, 45), torch.nan)
    sum_products[(2, 3, 2)](out, grad, lse, lse_grad, delta, *out.stride()[:3], *grad.stride()[:3],
                            3, 45, DIM=64, BLOCK=32, WITH_LSE=with_lse)
    expected = (out.float() * grad.float()).sum(-1) - (lse_grad if with_lse else 0.0)
    expected[1, 2, 7] = 0.0
    torch.testing.assert_close(delta, expected, atol=1e-4, rtol=1e-5)


@interpreted
def test_parts_are_added_up() -> None:
    """Only the rows that were cut are written, scaled, and none beyond the last."""
    parts = torch.randn(3, 2, 4, 128, 64)
    out = torch.zeros(2, 4, 300, 64, dtype=torch.float16)
    sum_parts[(4, 4, 2)](parts, out, *out.stride()[:3], 4, 128, 256, 300, 3, 0.5, DIM=64, BLOCK=32)
    expected = torch.zeros(2, 4, 300, 64)
    expected[:, :, 256:] = 0.5 * parts.sum(0)[:, :, :44]
    torch.testing.assert_close(out.float(), expected, atol=2e-3, rtol=1e-3)


def test_a_sink_and_last_rows_are_cut() -> None:
    """The first tile of keys meets every row, the last rows meet every key; no item is then longer
    than a program's share of the work by much."""
    shape = Shape(32768, 32768)
    for side, groups, first in ((KeySide(TRIANGLE, 4), 8, 0), (QuerySide(TRIANGLE, 4), 8, 1020)):
        cut = cut_call(side, shape, groups, groups, 132, 1024)
        masked, full = side.count_steps(shape)
        steps = (masked + full) * side.members
        share = steps.sum() * groups / 132
        assert cut.split_first == first and cut.splits > 1
        assert steps[cut.split_first] / cut.splits <= share


def test_long_dense_calls_are_not_cut() -> None:
    for side in (KeySide(simplify(Causal()), 4), QuerySide(simplify(Causal()), 4)):
        assert cut_call(side, Shape(32768, 32768), 8, 8, 132, 1024).splits == 1


def test_heavy_items_start_first() -> None:
    """Causal: the first keys are seen most, the last queries see most."""
    causal = simplify(Causal())
    assert not KeySide(causal, 1).last_first and QuerySide(causal, 1).plan.last_first


def made(side: KeySide | QuerySide, dim: int) -> Launch:
    """A launch for 300 queries and keys of 8 heads over 2."""
    q, grad = torch.zeros(1, 8, 300, dim), torch.zeros(1, 8, 300, dim)
    k, v = torch.zeros(1, 2, 300, dim), torch.zeros(1, 2, 300, dim)
    if isinstance(side, KeySide):
        return plan_launch(side, Shape(300, 300), (k, v), (q, grad), (k, v), 132)
    return plan_launch(side, Shape(300, 300), (q, grad), (k, v), (q,), 132)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("side", [KeySide(TRIANGLE, 4), QuerySide(TRIANGLE, 4)], ids=["key", "row"])
def test_launch_arguments_fit_the_kernel(side: KeySide | QuerySide, dim: int) -> None:
    """As many arguments as the emitted kernel names, boxes of 64 rows or one grain."""
    plan = made(side, dim)
    text = side.source
    names = text[text.index("def gradients(") + len("def gradients("):]
    names = [name.split(":")[0].strip() for name in names[:names.index("):")].split(",")]
    given = len(plan.tiled) + len(plan.pointers(*[torch.zeros(1)] * 2, None, torch.zeros(2)))
    given += len(plan.numbers(Shape(300, 300), 0.1, 8))
    constants = set(constants_of(side, dim)) - {"num_warps", "maxnreg"}
    assert set(names[given:]) == constants
    for _, box in plan.tiled:
        rows = box[0] * box[1] * box[2]
        assert (rows, box[3]) in {(64, dim), (32, 64)}
    assert blocks_of(side, dim)[0] == plan.tiled[0][1]


def test_what_it_refuses() -> None:
    assert not refuse_mask(TRIANGLE) and not refuse_mask(simplify(Full()))
    assert "kind of head" in refuse_mask(simplify(PerHead([Sink(4), Window(9)])))
    assert "comes with the call" in refuse_mask(simplify(VerticalSlash("vs")))
    assert "dead tiles" in refuse_mask(simplify(Causal() & (Stride(256) | Window(128))))
    assert not refuse_dims(64, 64) and not refuse_dims(128, 128)
    assert refuse_dims(96, 96) and refuse_dims(128, 64)


@interpreted
def test_it_must_be_asked_for_by_name() -> None:
    """No call reaches it otherwise; and by name it says why it does not take a call."""
    q = torch.zeros(1, 2, 64, 64, dtype=torch.float16)
    attn = maskdsl.compile(Window(9), backend="triton", backward=True)
    assert "backend='hopper'" in attn.refusal(q, q, q, backward=True)
    named = maskdsl.compile(Window(9), backend="hopper", backward=True)
    assert named.refusal(q, q, q, backward=True) == "cpu is no Hopper GPU"
    plain = maskdsl.compile(Window(9), backend="torch")
    assert plain.refusal(q, q, q, backward=True) == "backend='torch'"


@pytest.mark.parametrize(("backend", "backward"), [
    ("triton", "atomic"), (None, "atomic"), ("hopper", "fast"), ("torch", 2)])
def test_bad_backward(backend: str | None, backward: object) -> None:
    with pytest.raises(GradientError):
        maskdsl.compile(Window(9), backend=backend, backward=backward)  # type: ignore[arg-type]
