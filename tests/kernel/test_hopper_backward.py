"""The Hopper backward without a GPU: its small kernels in Triton's interpreter, how calls are cut,
what it refuses, and how it is asked for."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import maskdsl
from maskdsl import (
    Causal,
    Full,
    LastQ,
    Mask,
    PerHead,
    Shape,
    Sink,
    Softcap,
    Stride,
    VerticalSlash,
    Window,
)
from maskdsl.codegen import hopper_backward, kernel
from maskdsl.codegen.backward import TritonBackward
from maskdsl.codegen.gradients import prepare_backward
from maskdsl.codegen.hopper_backward import Launch, blocks_of, plan_launch, pointers
from maskdsl.codegen.hopper_backward_cut import (
    KeySide,
    QuerySide,
    cut_call,
    refuse_dims,
    refuse_mask,
)
from maskdsl.codegen.hopper_backward_kernels import sum_parts, sum_products
from maskdsl.codegen.kernel import TritonForward, interpreting
from maskdsl.codegen.tune import Config
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


def tensors_of(dim: int, length: int = 300) -> list[torch.Tensor]:
    """q, the output's gradient, k and v: 8 heads over 2."""
    return [torch.zeros(1, heads, length, dim, dtype=torch.float16) for heads in (8, 8, 2, 2)]


def made(side: KeySide | QuerySide, dim: int) -> Launch:
    """A launch for 300 queries and keys of 8 heads over 2."""
    q, grad, k, v = tensors_of(dim)
    if isinstance(side, KeySide):
        return plan_launch(side, Shape(300, 300), 0.1, (k, v), (q, grad), (k, v), 132)
    return plan_launch(side, Shape(300, 300), 0.1, (q, grad), (k, v), (q,), 132)


@pytest.mark.parametrize(("side", "dim"), [
    (KeySide(TRIANGLE, 4), 64), (KeySide(TRIANGLE, 4), 128), (QuerySide(TRIANGLE, 4), 64),
    (QuerySide(TRIANGLE, 4), 128)], ids=repr)
def test_launch_arguments_fit_the_kernel(side: KeySide | QuerySide, dim: int) -> None:
    """As many arguments as the emitted kernel names, boxes of 64 rows or one grain."""
    plan = made(side, dim)
    text = side.source
    names = text[text.index("def gradients(") + len("def gradients("):]
    names = [name.split(":")[0].strip() for name in names[:names.index("):")].split(",")]
    nothing = torch.zeros(1)
    given = len(plan.tiled) + len(plan.scalars) + len(pointers((nothing, nothing), (), nothing))
    assert set(names[given:]) == set(plan.constants) - {"num_warps", "maxnreg"}
    boxes = [tuple(one.block_shape) for one in plan.tiled]
    assert boxes == blocks_of(side, dim)
    for box in boxes:
        rows = box[0] * box[1] * box[2]
        assert (rows, box[3]) in {(64, dim), (32, 64)}


def test_a_repeated_call_is_not_planned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls whose tensors look alike share a launch; another length, scale or stride has its own.
    The tensors and their parts are those of the call, and no launch keeps one alive."""
    planned: list[Launch] = []
    launched: list[tuple[Any, ...]] = []
    kernel = {(n,): lambda *given, **constants: launched.append(given) for n in range(133)}

    def plan(*arguments: Any) -> Launch:
        planned.append(replace(plan_launch(*arguments), kernel=kernel))
        return planned[-1]

    monkeypatch.setattr(hopper_backward, "plan_launch", plan)
    monkeypatch.setattr(hopper_backward, "queue", lambda _: torch.zeros(2, dtype=torch.int32))
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda _: SimpleNamespace(multi_processor_count=132))
    run = hopper_backward.SideKernel(QuerySide(TRIANGLE, 4))

    def launch(length: int = 300, scale: float = 0.1, turned: bool = False) -> torch.Tensor:
        q, grad, k, v = tensors_of(64, length)
        if turned:
            grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
        rows = torch.zeros(1, 8, length)
        run(SimpleNamespace(shape=Shape(length, length), scale=scale),  # type: ignore[arg-type]
            (q, grad), (k, v), (torch.empty_like(q),), (rows, rows))
        return q

    first, second = launch(), launch()
    assert len(planned) == 1 and len(launched) == 2
    assert launched[0][0].base is first and launched[1][0].base is second
    assert all(one.base is None for one in planned[0].tiled)
    for n, different in enumerate([{"length": 310}, {"scale": 0.2}, {"turned": True}], 2):
        launch(**different)  # type: ignore[arg-type]
        launch(**different)  # type: ignore[arg-type]
        assert len(planned) == n


def test_what_it_refuses() -> None:
    assert not refuse_mask(TRIANGLE) and not refuse_mask(simplify(Full()))
    assert "kind of head" in refuse_mask(simplify(PerHead([Sink(4), Window(9)])))
    assert "comes with the call" in refuse_mask(simplify(VerticalSlash("vs")))
    assert "dead tiles" in refuse_mask(simplify(Causal() & (Stride(256) | Window(128))))
    assert not refuse_dims(64, 64) and not refuse_dims(128, 128)
    assert refuse_dims(96, 96) and refuse_dims(128, 64)


@interpreted
def test_why_it_does_not_take_a_call() -> None:
    q = torch.zeros(1, 2, 64, 64, dtype=torch.float16)
    for backend, reason in (("triton", "backend='triton' is the portable kernel"),
                            ("hopper", "cpu is no Hopper GPU"), ("torch", "backend='torch'")):
        attn = maskdsl.compile(Window(9), backend=backend)
        assert attn.refusal(q, q, q, backward=True) == reason


@interpreted
@pytest.mark.parametrize("must", [False, True])
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_it_is_the_default_where_it_takes_a_call(monkeypatch: pytest.MonkeyPatch, must: bool,
                                                 layout: str) -> None:
    """On a Hopper GPU, which is pretended here, by name or not; portable kernels do the rest."""
    monkeypatch.setattr(kernel, "arch_of", lambda _: "sm_90")
    monkeypatch.setattr(TritonForward, "prepare", lambda *_: lambda *_: None)
    scale, shape = 0.1, Shape(64, 64)

    def chosen(mask: Mask, dim: int = 64, **options: Any) -> Any:
        forward = TritonForward(simplify(mask), **{"hopper": True, "must": must, **options})
        q = torch.zeros(1, 64, 4, dim, dtype=torch.float16).transpose(1, 2)
        k = torch.zeros(1, 64, 2, dim, dtype=torch.float16).transpose(1, 2)
        return prepare_backward(forward, q, k, k, shape, scale, layout, False).kernels

    made = chosen(Causal() & Window(9))
    assert isinstance(made, hopper_backward.HopperBackward) and made.by_key.side.share == 2
    assert made is chosen(Causal() & Window(9))  # calls of one mask share it
    for other in (chosen(Window(9), hopper=False, must=False), chosen(Window(9), 32),
                  chosen(Window(9), config=Config(64, 64, 4, 2)),
                  chosen(Window(9), scores=(Softcap(5.0),)),
                  chosen(PerHead([Sink(4)] * 2 + [Window(9)] * 2)),
                  chosen(Causal() & (Stride(256) | Window(128)))):
        assert isinstance(other, TritonBackward)


@pytest.mark.parametrize("backend", [None, "triton", "hopper", "torch"])
@pytest.mark.parametrize("backward", ["atomic", 2, None])
def test_bad_backward(backend: str | None, backward: object) -> None:
    with pytest.raises(GradientError, match="backward=True, backward='deterministic' or "):
        maskdsl.compile(Window(9), backend=backend, backward=backward)  # type: ignore[arg-type]
