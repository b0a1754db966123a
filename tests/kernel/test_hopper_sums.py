"""The Hopper kernel without maxima, on the emulator: which items are given up, and that they are
computed again."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hopper_sums import FAR_APART, spread
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import masks, shapes
from test_hopper_machine import CHANGES, TRIANGLE, draw, on_machine

from maskdsl import Causal, Chunk, Full, Mask, Shape, Sink, Stride, Window, dense, simplify
from maskdsl.codegen import hopper
from maskdsl.codegen.hopper import HopperForward
from maskdsl.codegen.hopper_cut import pick_hopper, refuse_mask
from maskdsl.codegen.kernel import LOG2_E, output_maker
from maskdsl.dense import dense_attention

__all__ = ["on_machine"]  # a fixture
# what is given up overflows first
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
EPS = torch.finfo(torch.bfloat16).eps


@pytest.fixture
def flags(on_machine: Any, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """All calls count as long; the queue of every call, with the flags its launches left."""
    made: list[torch.Tensor] = []

    def queue(_: Any, items: int = 0) -> torch.Tensor:
        made.append(torch.zeros(hopper.COUNTERS + items, dtype=torch.int32))
        return made[-1]

    monkeypatch.setattr(hopper, "queue", queue)
    monkeypatch.setattr(hopper, "LONG_SHARE", 0)
    return made


def check(mask: Mask, shape: Shape, dim: int, scores: tuple[float, float, float]) -> None:
    """Output and lse against float64, with scores far apart."""
    whole, sizes = simplify(mask), (1, 4, 1)
    q, k, v, _ = draw(sizes, shape, dim, torch.bfloat16)
    q, k = spread(q, k, *scores)
    call = HopperForward(whole).prepare(
        q, k, v, shape, dim**-0.5 * LOG2_E, output_maker(q, dim, "bhld", True), True,
        pick_hopper(whole, 4, dim))
    out, lse = call(q, k, v, {})
    exact, exact_lse = dense_attention(q.double(), k.double(), v.double(),
                                       dense(whole, shape, 1, 4, "cpu", {}))
    torch.testing.assert_close(lse.double(), exact_lse, atol=4e-6, rtol=2e-6)
    torch.testing.assert_close(out.double(), exact, atol=2 * EPS, rtol=2 * EPS)


MASKS = [(Causal(), 64), (Causal(), 128), (Full(), 64), (Causal() & TRIANGLE, 64),
         (Causal() & (Sink(3) | Window(200)), 128), (Causal() & (Chunk(192) | Stride(64)), 64)]


@pytest.mark.parametrize("scores", FAR_APART, ids=str)
@pytest.mark.parametrize(("mask", "dim"), MASKS, ids=repr)
def test_scores_far_apart(flags: list[torch.Tensor], mask: Mask, dim: int,
                          scores: tuple[float, float, float]) -> None:
    check(mask, Shape(500, 500), dim, scores)
    assert flags and not flags[-1].any()  # the next call finds none


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(masks(), shapes(max_len=300), st.sampled_from(FAR_APART), st.integers(0, 99))
def test_random_masks(on_machine: Any, flags: list[torch.Tensor], mask: Mask, shape: Shape,
                      scores: tuple[float, float, float], seed: int) -> None:
    on_machine.seed = seed
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if not refuse_mask(simplify(mask), by_name=True) and shape.q_len and shape.kv_len and \
            max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        check(mask, shape, 64, scores)


@pytest.mark.parametrize(("mask", "scores", "given_up"), [
    (Causal(), (0.0, 0.0, 1.0), False), (Causal(), (300.0, 0.0, 1.0), False),
    (Causal(), (-300.0, 0.0, 1.0), False), (Causal(), (0.0, 400.0, 1.0), False),
    (Causal(), (0.0, -400.0, 1.0), True), (Causal(), (0.0, 0.0, 200.0), True),
    (Full(), (300.0, 0.0, 1.0), False), (Full(), (-300.0, 0.0, 1.0), False),
    (Full(), (0.0, -400.0, 1.0), False), (Full(), (0.0, 400.0, 1.0), True)])
def test_who_is_given_up(flags: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, mask: Mask,
                         scores: tuple[float, float, float], given_up: bool) -> None:
    """The first tile is the diagonal of causal attention, the first keys of full attention. No
    shift of all scores is too much; only what rises far above that tile is."""
    monkeypatch.setattr(hopper, "GIVEN_UP", hopper.BY_MAXIMUM)  # flags stay up
    check(mask, Shape(640, 640), 64, scores)
    assert bool(flags[-1][hopper.COUNTERS:].any()) == bool(flags[-1][2]) == given_up


@pytest.mark.parametrize("change", [
    {"used & ~(": "(total < 0) & ("},  # nothing is ever flagged
    {"item = gl.where(flag == 0, item + gl.num_programs(0), item)":
     "item = gl.where(flag == 0, items, item)"}], ids=str)  # only the first item is looked at
def test_faults_show(flags: list[torch.Tensor], change: dict[str, str]) -> None:
    CHANGES.update(change)

    def run() -> None:
        for scores in FAR_APART:
            check(Causal(), Shape(500, 500), 64, scores)
        assert not flags[-1].any()

    with pytest.raises(AssertionError):
        run()


def record(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> tuple[Any, list[Any]]:
    """A call, and the (thread, mode) of its launches, which compute nothing and take a while."""
    launched: list[Any] = []

    class Slow:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: Any, **constants: Any) -> None:
                mode = next(x for x in arguments if type(x) is int)
                launched.append((threading.get_ident(), mode))
                time.sleep(0.005)
            return launch

    monkeypatch.setattr(hopper, "load_module", lambda _: SimpleNamespace(forward=Slow()))
    whole, q = simplify(Causal()), torch.zeros(1, 1, 300, 64, dtype=dtype)
    call = HopperForward(whole).prepare(q, q, q, Shape(300, 300), 1.0, output_maker(
        q, 64, "bhld", True), True, pick_hopper(whole, 1, 64))
    return lambda: call(q, q, q, {}), launched


def test_no_other_thread_launches_between(monkeypatch: pytest.MonkeyPatch,
                                         flags: list[torch.Tensor]) -> None:
    """Calls of several threads on one stream share its flags."""
    call, launched = record(monkeypatch, torch.bfloat16)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: call(), range(12)))
    assert len(launched) == 24
    for (who, mode), (other, second) in zip(launched[::2], launched[1::2], strict=True):
        assert who == other and (mode, second) == (hopper.BY_SUM, hopper.GIVEN_UP)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float16, 0), (torch.bfloat16, 256)])
def test_short_calls_and_fp16_keep_their_maxima(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype,
                                                share: int, flags: list[torch.Tensor]) -> None:
    monkeypatch.setattr(hopper, "LONG_SHARE", share)
    call, launched = record(monkeypatch, dtype)
    call()
    assert [mode for _, mode in launched] == [hopper.BY_MAXIMUM]


def test_the_kernel_keeps_them_in_fp16_too(monkeypatch: pytest.MonkeyPatch,
                                           flags: list[torch.Tensor]) -> None:
    """Whatever the mode of its launch."""
    monkeypatch.setattr(hopper, "modes_of", lambda *_: (hopper.BY_SUM,))
    whole, shape = simplify(Causal()), Shape(500, 500)
    q, k, v, _ = draw((1, 4, 1), shape, 64, torch.float16)
    q = q * 50
    call = HopperForward(whole).prepare(q, k, v, shape, 0.125 * LOG2_E, output_maker(
        q, 64, "bhld", True), True, pick_hopper(whole, 4, 64))
    out, _ = call(q, k, v, {})
    exact, _ = dense_attention(q.double(), k.double(), v.double(),
                               dense(whole, shape, 1, 4, "cpu", {}))
    torch.testing.assert_close(out.double(), exact, atol=2 * EPS, rtol=2 * EPS)
    assert not flags[-1].any()
