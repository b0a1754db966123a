"""The Hopper kernel without maxima, and what it gives up, against dense attention. Needs an H100 or
H200."""

from __future__ import annotations

import pytest
import torch
from hopper_marks import NEEDS_HOPPER
from hopper_sums import FAR_APART, spread
from hypothesis import HealthCheck, given, settings
from oracle import Case, check_case, check_close, make_inputs
from strategies import masks, shapes
from test_gpu_hopper import FORCED, LENGTHS, MASKS, TRIANGLE, case_of

import maskdsl
from maskdsl import Causal, Chunk, Full, Mask, PerHead, Shape, Sink, Stride, Window, dense
from maskdsl.codegen import hopper
from maskdsl.codegen.hopper_cut import refuse_mask
from maskdsl.dense import dense_attention
from maskdsl.simplify import simplify

pytestmark = NEEDS_HOPPER
DIMS = [(16, 16), (64, 32), (64, 64), (80, 80), (96, 96), (128, 64), (128, 128), (192, 128),
        (256, 256)]


@pytest.fixture(autouse=True)
def all_calls_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that none asks for maxima."""
    monkeypatch.setattr(hopper, "LONG_SHARE", 0)


@pytest.mark.parametrize(("mask", "causal"), MASKS, ids=lambda x: repr(x)[:40])
def test_mask_and_length(mask: Mask, causal: bool) -> None:
    for q_len, kv_len in LENGTHS:
        check_case(case_of(mask, q_len, kv_len, 2, 4, 2, 128, dtype=torch.bfloat16, causal=causal),
                   "cuda")


@pytest.mark.parametrize(("dim", "value_dim"), DIMS)
def test_head_sizes(dim: int, value_dim: int) -> None:
    for mask, causal, heads in ((TRIANGLE, True, 4), (Full(), True, 4), (Full(), False, 3)):
        check_case(case_of(mask, 1000, 1000, 1, heads, 1, dim, value_dim, dtype=torch.bfloat16,
                           causal=causal), "cuda")


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (2, 1), (8, 2), (6, 3)])
def test_grouped_heads_of_three_groups(heads: int, kv_heads: int) -> None:
    """Dense attention at D = 64 has items of 192 rows."""
    for length in (1, 47, 193, 2000):
        check_case(case_of(Full(), length, length + 5, 2, heads, kv_heads, 64,
                           dtype=torch.bfloat16), "cuda")


@pytest.mark.parametrize("mask", [Stride(64) | Sink(70), Chunk(500) | Stride(128),
                                  PerHead([Window(300)] * 2 + [TRIANGLE] * 2)], ids=repr)
def test_dead_tiles_and_kinds_of_heads(mask: Mask) -> None:
    check_case(case_of(mask, 1500, 1500, 1, 4, 1, 128, dtype=torch.bfloat16), "cuda")


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(masks(), shapes(max_len=400))
def test_random_masks(mask: Mask, shape: Shape) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if refuse_mask(simplify(mask)) or not shape.q_len or not shape.kv_len or \
            max(shape.q_offset + shape.q_len, shape.kv_len) > limit:
        return
    check_case(Case(mask, shape.q_len, shape.kv_len, 1, 4, 1, 64, dtype=torch.bfloat16,
                    causal=False, q_offset=shape.q_offset, total_len=shape.total_len,
                    options=FORCED), "cuda")


def check_far_apart(mask: Mask, length: int, heads: int, dim: int,
                    scores: tuple[float, float, float], graph: bool = False) -> None:
    """Output and lse with scores far apart, twice: what a call gives up, the next must not."""
    case = Case(mask, length, length, 1, heads, 1, dim, dtype=torch.bfloat16, options=FORCED)
    q, k, v = make_inputs(case, "cuda")
    q, k = spread(q, k, *scores)
    live = dense(case.whole, case.shape, 1, heads, "cuda", {})
    exact, exact_lse = dense_attention(q.double(), k.double(), v.double(), live)
    plain, _ = dense_attention(q, k, v, live)
    attn = maskdsl.compile(mask, **FORCED)
    for _ in range(2):
        out, lse = attn(q, k, v, return_lse=True)
        if graph:
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded):
                out, lse = attn(q, k, v, return_lse=True)
            recorded.replay()
            recorded.replay()
        check_close(out, exact, plain, case)
        assert ((lse.double() - exact_lse).abs() <= 2e-5 + 2e-6 * exact_lse.abs()).all()
    assert not any(queue.any() for kept in hopper._queues.values() for queue in kept)


@pytest.mark.parametrize("scores", FAR_APART, ids=str)
@pytest.mark.parametrize(("mask", "dim"), [
    (Full(), 64), (Full(), 128), (Full(), 256), (TRIANGLE, 128), (Window(300), 64)], ids=repr)
def test_scores_far_apart(mask: Mask, dim: int, scores: tuple[float, float, float]) -> None:
    check_far_apart(mask, 3000, 4, dim, scores)


def test_scores_far_apart_in_a_graph() -> None:
    check_far_apart(Full(), 2000, 4, 64, (0.0, -400.0, 30.0), graph=True)
    check_far_apart(TRIANGLE, 2000, 2, 128, (0.0, 400.0, 1.0), graph=True)


def test_heavy_rows_that_are_given_up() -> None:
    """Few heads and a long prompt: ranges of keys of the last rows are items of their own."""
    for scores in ((0.0, 0.0, 40.0), (0.0, 300.0, 1.0), (-300.0, -300.0, 1.0)):
        check_far_apart(TRIANGLE, 8000, 1, 128, scores)


def test_without_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long call leaves maxima out by itself, a short one and fp16 do not."""
    monkeypatch.undo()
    launched: list[int] = []
    real = hopper.HopperForward.kernel

    class Recorder:
        def __init__(self, kernel: object) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            def launch(*arguments: object, **constants: object) -> None:
                launched.append(next(x for x in arguments if type(x) is int))  # type: ignore[arg-type]
                self.kernel[grid](*arguments, **constants)  # type: ignore[index]
            return launch

    def kernel(self: hopper.HopperForward, config: object) -> object:
        plans, made = real(self, config)  # type: ignore[arg-type]
        return plans, Recorder(made)

    monkeypatch.setattr(hopper.HopperForward, "kernel", kernel)
    for length, dtype, modes in ((16384, torch.bfloat16, [hopper.BY_SUM, hopper.GIVEN_UP]),
                                 (16384, torch.float16, [hopper.BY_MAXIMUM]),
                                 (512, torch.bfloat16, [hopper.BY_MAXIMUM])):
        q = torch.randn(1, 8, length, 64, device="cuda", dtype=dtype)
        launched.clear()
        maskdsl.compile(Causal(), backend="hopper")(q, q[:, :2], q[:, :2])
        assert launched == modes
