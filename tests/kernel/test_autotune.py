"""Autotuning with a fake timer in Triton's interpreter: every candidate computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Case, make_inputs, run

import maskdsl
from maskdsl import (
    BlockIndices,
    Blocks,
    Causal,
    LastQ,
    PerHead,
    Sink,
    VerticalSlash,
    Window,
    errors,
)
from maskdsl.api import Attention
from maskdsl.codegen.autotune import INTERPRETER, Autotuned
from maskdsl.codegen.choices import Tuner
from maskdsl.codegen.kernel import TritonForward, interpreting
from maskdsl.codegen.tune import Config
from maskdsl.indices import VSIndices

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU is here: see tests/gpu")
TRIANGLE = Sink(4) | Window(40) | LastQ(20)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MASKDSL_CACHE_DIR", str(tmp_path))
    return tmp_path / "tuned"


class Clock:
    """A timer that runs each call, keeps its result, and lets the n-th win."""

    def __init__(self, winner: int) -> None:
        self.winner = winner
        self.results: list[Any] = []

    def __call__(self, run: Callable[[], object]) -> float:
        self.results.append(run())
        return 1.0 if len(self.results) - 1 == self.winner else 2.0


def tuned(mask: maskdsl.Mask, clock: Clock, **options: Any) -> Attention:
    """Autotuned attention with a clock of its own, which `compile` refuses in the interpreter."""
    attn = maskdsl.compile(mask, backend="triton", **options)
    assert isinstance(attn._forward, TritonForward)
    attn._autotuned = Autotuned(attn._forward, Tuner(clock))
    return attn


@pytest.mark.parametrize("winner", range(len(INTERPRETER)))
def test_the_winner_runs_and_all_agree(winner: int) -> None:
    q, k, v = make_inputs(Case(TRIANGLE, 70, 70, 1, 2, 1, 16), "cpu")
    clock = Clock(winner)
    attn = tuned(TRIANGLE, clock)
    out = attn(q, k, v)
    assert torch.equal(out, clock.results[winner]) and len(clock.results) == len(INTERPRETER)
    expected, _ = run(Case(TRIANGLE, 70, 70, options={"backend": "torch"}), q, k, v)
    for result in (out, *clock.results):
        torch.testing.assert_close(result, expected)
    (made,) = attn.tuned
    assert made.setting == Config(*INTERPRETER[winner]) and made.source == "timed"
    variants = attn._forward.variants.values()  # type: ignore[union-attr]
    assert {variant.config for variant in variants} == {Config(*one) for one in INTERPRETER}


def test_warm_calls_and_like_kinds_are_not_timed(folder: Path) -> None:
    q, k, v = make_inputs(Case(TRIANGLE, 70, 70, 1, 2, 1, 16), "cpu")
    clock = Clock(1)
    attn = tuned(TRIANGLE, clock)
    attn(q, k, v)
    attn(q, k, v)
    attn(q[:, :, :66], k[:, :, :66], v[:, :, :66])  # also up to 128
    attn(q, k, v, return_lse=True)
    assert len(clock.results) == 3 and len(attn.tuned) == 1
    other = Clock(0)
    again = tuned(TRIANGLE, other)
    again(q, k, v)
    assert not other.results and again.tuned == attn.tuned and again.tuned[0].source == "file"
    attn(q[:, :, :60], k[:, :, :60], v[:, :, :60])
    assert len(clock.results) == 6 and len(attn.tuned) == 2 and len(list(folder.iterdir())) == 2


def test_masks_have_choices_of_their_own() -> None:
    q, k, v = make_inputs(Case(TRIANGLE, 70, 70, 1, 2, 1, 16), "cpu")
    first, clock = tuned(Window(9), Clock(1)), Clock(2)
    first(q, k, v)
    second = tuned(Window(10), clock)
    second(q, k, v)
    assert len(clock.results) == 3 and first.tuned[0].kind.family != second.tuned[0].kind.family
    lambdas = [maskdsl.Where(lambda b, h, q, k, n=n: q - k < n) for n in (9, 10)]
    families = {Autotuned(TritonForward(Causal() & mask)).program for mask in lambdas}
    assert len(families) == 2  # though both print alike


def test_data_of_the_call_is_what_is_timed() -> None:
    mask = PerHead([VerticalSlash("vs"), Blocks("b", 16, 16)])
    q, k, v = make_inputs(Case(mask, 36, 36, 1, 2, 1, 16), "cpu")
    found = {"vs": VSIndices(torch.randint(36, (1, 2, 5)), torch.randint(36, (1, 2, 6))),
             "b": BlockIndices(torch.rand(1, 2, 3, 3) < 0.4, 16, 16)}
    expected = maskdsl.compile(mask, backend="triton")(q, k, v, **found)
    clock = Clock(1)
    attn = tuned(mask, clock, layout="blhd")
    out = attn(*(t.transpose(1, 2).contiguous() for t in (q, k, v)), **found)
    torch.testing.assert_close(out.transpose(1, 2), expected)
    assert len(clock.results) == 3
    for result in clock.results:
        torch.testing.assert_close(result.transpose(1, 2), expected)


def test_empty_calls_are_not_timed() -> None:
    clock = Clock(0)
    attn = tuned(TRIANGLE, clock)
    some, none = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 0, 16)
    assert attn(none, none, none).shape == none.shape and (attn(some, none, none) == 0).all()
    assert not clock.results and attn.tuned == ()


def test_capture_is_refused_while_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = make_inputs(Case(TRIANGLE, 70, 70), "cpu")
    attn = tuned(TRIANGLE, Clock(1))
    monkeypatch.setattr("maskdsl.codegen.autotune.is_capturing", lambda device: True)
    with pytest.raises(errors.BackendError, match="before the capture"):
        attn(q, k, v)
    monkeypatch.setattr("maskdsl.codegen.autotune.is_capturing", lambda device: False)
    out = attn(q, k, v)
    monkeypatch.setattr("maskdsl.codegen.autotune.is_capturing", lambda device: True)
    assert torch.equal(tuned(TRIANGLE, Clock(0))(q, k, v), out)


def test_where_there_is_nothing_to_tune() -> None:
    with pytest.raises(errors.BackendError, match="leave autotune out"):
        maskdsl.compile(TRIANGLE, autotune=True)
    with pytest.raises(errors.BackendError, match="TRITON_INTERPRET"):
        maskdsl.compile(TRIANGLE, backend="triton", autotune=True)
    with pytest.raises(errors.BackendError, match="one of the two"):
        maskdsl.compile(TRIANGLE, backend="triton", autotune=True, tile=(64, 64))
    assert maskdsl.compile(TRIANGLE, backend="triton").tuned == ()
