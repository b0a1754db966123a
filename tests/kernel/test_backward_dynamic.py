"""Gradients under runtime slots, kinds of heads and score modifiers, in Triton's interpreter,
against dense autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dynamic_strategies import BATCH, HEADS, KV_HEADS, dynamic_masks, per_head_masks, slot_data
from gradient_oracle import check_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, make_inputs
from score_oracle import make_data, some_mods
from strategies import masks, shapes

import maskdsl
from maskdsl import (
    Bias,
    BlockIndices,
    Blocks,
    Columns,
    Dilated,
    Document,
    Documents,
    LastQ,
    Mask,
    PerHead,
    RelativePosition,
    Shape,
    Sink,
    SinkLogits,
    Softcap,
    VerticalSlash,
    VSIndices,
    Window,
)
from maskdsl.codegen.kernel import interpreting
from maskdsl.heads import count_heads

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU is here: see tests/gpu")
TILES = st.sampled_from([(16, 16), (32, 32), (32, 16), (16, 32)])
DTYPES = st.sampled_from([torch.float16, torch.float32])


def check_random(mask: Mask, shape: Shape, slots: dict[str, Any], tile: tuple[int, int],
                 **more: Any) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        check_gradients(Case(
            mask, shape.q_len, shape.kv_len, BATCH, HEADS, KV_HEADS, 16, causal=False,
            q_offset=shape.q_offset, total_len=shape.total_len, slots=slots,
            options={"backend": "triton", "tile": tile}, **more))


@settings(max_examples=4)
@given(st.data(), dynamic_masks(), shapes(max_len=90), TILES, DTYPES)
def test_slots(data: st.DataObject, mask: Mask, shape: Shape, tile: tuple[int, int],
               dtype: torch.dtype) -> None:
    check_random(mask, shape, data.draw(slot_data(mask, shape)), tile, dtype=dtype)


@settings(max_examples=2)
@given(st.data(), per_head_masks(), shapes(max_len=60), TILES)
def test_kinds_of_heads(data: st.DataObject, mask: Mask, shape: Shape,
                        tile: tuple[int, int]) -> None:
    check_random(mask, shape, data.draw(slot_data(mask, shape)), tile)


LEADS = st.sampled_from([(1, 1), (BATCH, HEADS), (1, HEADS)])


@settings(max_examples=3)
@given(st.data(), st.one_of(masks(3), dynamic_masks(3), per_head_masks()), shapes(max_len=50),
       some_mods(), LEADS, TILES)
def test_scores(data: st.DataObject, mask: Mask, shape: Shape, mods: Any,
                lead: tuple[int, int], tile: tuple[int, int]) -> None:
    check_random(mask, shape, data.draw(slot_data(mask, shape)), tile, scores=mods,
                 data=make_data(mods, shape, 0, lead))


TRIANGLE = Sink(4) | Window(20) | LastQ(10)
OPTIONS = {"backend": "triton", "tile": (32, 32)}
VS = VSIndices(torch.tensor([[[1, 2, 30, 45]]]), torch.tensor([[[0, 3, 33]]]))


@pytest.mark.parametrize(("mask", "slots"), [
    (VerticalSlash("vs") | TRIANGLE, {"vs": VS}), (VerticalSlash("vs") - Window(9), {"vs": VS}),
    (VerticalSlash("vs") & Window(33), {"vs": VS}),
    (VerticalSlash("vs", "block64"), {"vs": VS}),
    (VerticalSlash("vs"), {"vs": VSIndices(torch.full((1, 1, 3), -1), torch.full((1, 1, 3), -1))}),
    (VerticalSlash("vs"), {"vs": VSIndices(torch.full((1, 1, 1), -1), torch.zeros(1, 1, 1, dtype=(
        torch.int64)))}),  # one live key a row: dQ and dK are 0, but for the order of two sums
    (Window(7) - (Dilated(8, 2) | Document("doc")), {"doc": Documents.from_ids(
        torch.arange(75) // 30)}),  # a dead-tile test that looks up documents
    (Blocks("b", 16, 16) - Sink(3), {"b": BlockIndices.from_mask(
        torch.ones(1, 1, 5, 5, dtype=torch.bool), 16, 16)}),
    (Document("doc") & TRIANGLE, {"doc": Documents.from_ids(
        torch.tensor([0] * 20 + [-1] * 7 + [1] * 48))}),
    (PerHead([Columns("c"), TRIANGLE, VerticalSlash("vs"), Window(3)]),
     {"vs": VS, "c": torch.tensor([[[0, 5], [7, 60]]])}),
], ids=lambda x: repr(x)[:40] if isinstance(x, Mask) else "")
def test_mask(mask: Mask, slots: dict[str, Any]) -> None:
    """Two lengths, Dv != D, a chunk of a longer prompt."""
    heads = count_heads(mask) or 2
    check_gradients(Case(mask, 75, 75, 1, heads, heads // 2, 16, 32, options=OPTIONS, slots=slots))
    check_gradients(Case(mask, 19, 75, 1, heads, heads // 2, 16, dtype=torch.float16, q_offset=40,
                         total_len=90, options=OPTIONS, slots=slots), with_lse=False)


def test_the_default_tile() -> None:
    options = {"backend": "triton"}
    check_gradients(Case(VerticalSlash("vs") | TRIANGLE, 75, 75, dim=16, options=options,
                         slots={"vs": VS}, scores=(RelativePosition("table", 40),),
                         data={"table": torch.randn(1, 81)}))


MODS = (Softcap(3.0), Bias("bias"), RelativePosition("table", 6), SinkLogits("sinks"))


def gradients(attn: maskdsl.api.Attention, leaves: list[torch.Tensor], data: dict[str, Any],
              ) -> tuple[torch.Tensor, ...]:
    out = attn(*leaves, **data)
    wanted = [t for t in (*leaves, *data.values()) if isinstance(t, torch.Tensor) and
              t.requires_grad]
    return torch.autograd.grad((out * torch.arange(out.shape[3])).sum(), wanted)


def test_only_what_is_asked_for_and_the_same_bits_every_time() -> None:
    leaves = [t.requires_grad_() for t in make_inputs(Case(TRIANGLE, 40, 40, 1, 2, 1, 16), "cpu")]
    made = make_data(MODS, Shape(40, 40), 0, (1, 1), heads=2)
    data = {name: t.requires_grad_() for name, t in made.items()}
    attn = maskdsl.compile(VerticalSlash("vs") | TRIANGLE, scores=MODS, **OPTIONS)
    first, second = (gradients(attn, leaves, data | {"vs": VS}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for i, name in enumerate(data):
        fixed = {n: t if n == name else t.detach() for n, t in data.items()}
        one, = gradients(attn, [t.detach() for t in leaves], fixed | {"vs": VS})
        assert torch.equal(one, first[3 + i])


def test_checkpointing_and_memory() -> None:
    """Checkpointed gradients are those without; nothing of queries times keys is kept."""
    from torch.utils.checkpoint import checkpoint

    leaves = [t.requires_grad_() for t in make_inputs(Case(TRIANGLE, 40, 40, 1, 2, 1, 16), "cpu")]
    attn = maskdsl.compile(VerticalSlash("vs") | TRIANGLE, **OPTIONS)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out = attn(*leaves, vs=VS)
    assert sum(t.numel() for t in kept) <= sum(t.numel() for t in (*leaves, out)) + 2 * 40
    out.square().sum().backward()
    expected = [t.grad for t in leaves]
    for t in leaves:
        t.grad = None
    checkpoint(lambda *t: attn(*t, vs=VS), *leaves, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(t.grad, e) for t, e in zip(leaves, expected, strict=True))


def test_no_key_and_no_query() -> None:
    for q_len, kv_len in ((3, 0), (0, 3)):
        data = make_data(MODS, Shape(q_len, kv_len), 0, (1, 1))
        check_gradients(Case(VerticalSlash("vs") | TRIANGLE, q_len, kv_len, 1, 4, 2, 16,
                             q_offset=0, options=OPTIONS, slots={"vs": VS}, scores=MODS, data=data))


def test_layout() -> None:
    q, k, v = make_inputs(Case(TRIANGLE, 40, 40, 1, 2, 1, 16), "cpu")
    mask = VerticalSlash("vs") | TRIANGLE
    expected = gradients(maskdsl.compile(mask, **OPTIONS),
                         [t.clone().requires_grad_() for t in (q, k, v)], {"vs": VS})
    turned = [t.transpose(1, 2).contiguous().requires_grad_() for t in (q, k, v)]
    found = gradients(maskdsl.compile(mask, layout="blhd", **OPTIONS), turned, {"vs": VS})
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.transpose(1, 2), b, atol=1e-6)
