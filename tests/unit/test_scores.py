"""Score modifiers: both backends against dense attention, and the mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dynamic_strategies import BATCH, HEADS, KV_HEADS, dynamic_masks, per_head_masks, slot_data
from hypothesis import given, settings
from hypothesis import strategies as st
from score_oracle import MODS, make_data, modified_attention, some_mods
from strategies import masks, shapes

import maskdsl
from maskdsl import (
    ALiBi,
    Bias,
    Causal,
    Empty,
    LastQ,
    Mask,
    RelativePosition,
    Shape,
    Sink,
    SinkLogits,
    Softcap,
    Window,
    dense,
    errors,
)
from maskdsl.codegen.kernel import interpreting
from maskdsl.scores import ScoreMod, published_slopes

DIM = 16
interpreter = pytest.mark.skipif(not interpreting(), reason="a GPU is here: see tests/gpu")


def check(mask: Mask, mods: tuple[ScoreMod, ...], shape: Shape, backend: str,
          slots: dict[str, Any] | None = None, lead: tuple[int, int] = (1, 1),
          seed: int = 0) -> None:
    """One call against the oracle in float64."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(BATCH, HEADS, shape.q_len, DIM, generator=generator)
    k, v = (torch.randn(BATCH, KV_HEADS, shape.kv_len, DIM, generator=generator) for _ in range(2))
    data = make_data(mods, shape, seed, lead)
    options: dict[str, Any] = {"tile": (16, 16)} if backend == "triton" else {}
    attn = maskdsl.compile(mask, causal=False, backend=backend, scores=mods, **options)
    out, lse = attn(q, k, v, q_offset=shape.q_offset, total_len=shape.total_len, return_lse=True,
                    **data, **(slots or {}))
    live = dense(mask, shape, BATCH, HEADS, slots=slots)
    exact, exact_lse = modified_attention(q.double(), k.double(), v.double(), live, mods,
                              {n: t.double() for n, t in data.items()}, shape)
    assert torch.equal(lse == -torch.inf, exact_lse == -torch.inf)
    assert torch.allclose(out.double(), exact, atol=2e-5, rtol=0)
    finite = exact_lse.masked_fill(exact_lse == -torch.inf, 0.0)
    assert torch.allclose(lse.double().masked_fill(lse == -torch.inf, 0.0), finite, atol=4e-5)


LEADS = st.sampled_from([(1, 1), (BATCH, HEADS), (1, HEADS)])


def within(mask: Mask, shape: Shape) -> bool:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    return bool(max(shape.q_offset + shape.q_len, shape.kv_len) <= limit)


@settings(max_examples=40)
@given(masks(), shapes(), some_mods(), LEADS)
def test_torch(mask: Mask, shape: Shape, mods: tuple[ScoreMod, ...], lead: tuple[int, int]) -> None:
    if within(mask, shape):
        check(mask, mods, shape, "torch", lead=lead)


@interpreter
@settings(max_examples=15)
@given(masks(3), shapes(max_len=60), some_mods(), LEADS)
def test_triton(mask: Mask, shape: Shape, mods: tuple[ScoreMod, ...],
                lead: tuple[int, int]) -> None:
    if within(mask, shape):
        check(mask, mods, shape, "triton", lead=lead)


@interpreter
@settings(max_examples=8)
@given(st.one_of(dynamic_masks(3), per_head_masks()), shapes(max_len=50), some_mods(), st.data())
def test_slots_and_heads(mask: Mask, shape: Shape, mods: tuple[ScoreMod, ...],
                         data: st.DataObject) -> None:
    if within(mask, shape):
        slots = data.draw(slot_data(mask, shape))
        check(mask, mods, shape, "torch", slots, (BATCH, HEADS))
        check(mask, mods, shape, "triton", slots, (BATCH, HEADS))


@interpreter
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("mod", MODS, ids=repr)
def test_each_alone(mod: ScoreMod, backend: str) -> None:
    check(Causal() & (Sink(3) | Window(20) | LastQ(9)), (mod,), Shape(50, 70), backend)
    check(Empty(), (mod,), Shape(20, 20), backend)


@interpreter
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_that_lose_every_key(backend: str) -> None:
    """By a bias, by the mask, or because there is no key at all; with and without a sink."""
    for mods in ((Bias("bias"),), (Bias("bias"), SinkLogits("sinks")), (SinkLogits("sinks"),)):
        for mask in (Causal(), maskdsl.PerHead([Causal(), Window(1)] * 2)):
            check(mask, mods, Shape(1, 0, 0, 0), backend)
            check(mask, mods, Shape(40, 40), backend, lead=(BATCH, HEADS), seed=3)
    q = torch.zeros(1, 2, 3, DIM)
    gone = torch.full((1, 1, 3, 3), -torch.inf)
    out, lse = maskdsl.compile(Causal(), backend=backend, scores=Bias("b"))(
        q, q, q + 1, b=gone, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_order_matters() -> None:
    shape = Shape(30, 30)
    for mods in ((Softcap(1.0), ALiBi()), (ALiBi(), Softcap(1.0))):
        check(Causal(), mods, shape, "torch")


def test_gradients_reach_the_data() -> None:
    mods = (Softcap(3.0), Bias("bias"), RelativePosition("table", 4), SinkLogits("sinks"))
    shape, generator = Shape(40, 40), torch.Generator().manual_seed(1)
    tensors = [torch.randn(1, h, 40, DIM, generator=generator, dtype=torch.float64)
               for h in (HEADS, KV_HEADS, KV_HEADS)]
    data = {n: t.double().masked_fill(t.isinf(), 0.0) for n, t in
            make_data(mods, shape, 0, (1, HEADS)).items()}
    mask = Causal() & Window(9) - Sink(3)  # the first rows have no key
    grads = []
    for ours in (True, False):
        leaves = [t.clone().requires_grad_() for t in (*tensors, *data.values())]
        q, k, v = leaves[:3]
        given = dict(zip(data, leaves[3:], strict=True))
        if ours:
            out = maskdsl.compile(mask, backend="torch", scores=mods)(q, k, v, **given)
        else:
            live = dense(mask, shape)
            out, _ = modified_attention(q, k, v, live, mods, given, shape)
        (out * torch.linspace(-1, 1, DIM, dtype=torch.float64)).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for mine, theirs in zip(*grads, strict=True):
        assert mine.isfinite().all()
        assert torch.allclose(mine, theirs.nan_to_num(), atol=1e-9)


def test_published_slopes() -> None:
    """The paper's: 1/2, 1/4, ... for 8 heads; 12 heads take every other one of 16."""
    assert published_slopes(8) == tuple(2.0 ** -i for i in range(1, 9))
    assert published_slopes(12)[8:] == (2 ** -0.5, 2 ** -1.5, 2 ** -2.5, 2 ** -3.5)


def arbitrary(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return score * 2


@pytest.mark.parametrize(("make", "error", "told"), [
    (lambda: maskdsl.compile(Causal(), scores=arbitrary), errors.ScoreModError, "SinkLogits"),
    (lambda: maskdsl.compile(Causal(), scores=[Softcap(2.0), 3]), errors.ScoreModError, "Softcap"),
    (lambda: maskdsl.compile(Causal(), scores=[Bias("x"), SinkLogits("x")]), errors.ScoreModError,
     "same data"),
    (lambda: maskdsl.compile(maskdsl.Columns("x"), scores=Bias("x")), errors.ScoreModError,
     "same data"),
    (lambda: maskdsl.compile(Causal(), scores=[SinkLogits("a"), SinkLogits("b")]),
     errors.ScoreModError, "one SinkLogits"),
    (lambda: Softcap(0.0), errors.ScoreModError, "> 0"),
    (lambda: Softcap("3"), errors.ScoreModError, "> 0"),
    (lambda: ALiBi("abc"), errors.ScoreModError, "slopes|numbers"),
    (lambda: Bias("q"), errors.ScoreModError, "identifier"),
    (lambda: RelativePosition("t", -1), errors.ScoreModError, "reach"),
])
def test_bad_modifiers_are_told(make: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        make()


@pytest.mark.parametrize(("mod", "data", "error", "told"), [
    (SinkLogits("s"), {}, errors.MissingSlotError, "needs data"),
    (SinkLogits("s"), {"s": torch.zeros(3)}, errors.ScoreDataError, "one logit a query head"),
    (SinkLogits("s"), {"s": torch.zeros(2, dtype=torch.int32)}, errors.ScoreDataError, "floating"),
    (Bias("s"), {"s": torch.zeros(1, 1, 8, 9)}, errors.ScoreDataError, "is needed"),
    (RelativePosition("s", 2), {"s": torch.zeros(2, 4)}, errors.ScoreDataError, "is needed"),
    (ALiBi([1.0]), {}, errors.ScoreDataError, "slopes"),
    (Softcap(1.0), {"s": torch.zeros(2)}, errors.UnknownSlotError, "no slot"),
    (Bias("s"), {"s": torch.zeros(1, 1, 8, 8), "t": 1}, errors.UnknownSlotError, "q, k, v.*, s"),
])
def test_bad_data_is_told(mod: ScoreMod, data: dict[str, Any], error: type[Exception],
                          told: str) -> None:
    q = torch.zeros(1, 2, 8, 16)
    with pytest.raises(error, match=told):
        maskdsl.compile(Causal(), backend="torch", scores=mod)(q, q, q, **data)


@interpreter
def test_gradients_of_data_are_refused_where_they_were_forbidden() -> None:
    q, sinks = torch.zeros(1, 2, 8, 16), torch.zeros(2, requires_grad=True)
    attn = maskdsl.compile(Causal(), backend="triton", scores=SinkLogits("sinks"), backward=False)
    with pytest.raises(errors.GradientError):
        attn(q, q, q, sinks=sinks)
    with torch.no_grad():
        assert attn(q, q, q, sinks=sinks).shape == q.shape
