"""Ours, FlexAttention with our block masks, and dense attention: three ways, one result."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import masks
from torch.nn.attention import flex_attention as flex

import maskdsl
from maskdsl import (
    ALiBi,
    Bias,
    BlockIndices,
    Blocks,
    Causal,
    Chunk,
    ColumnIndices,
    Columns,
    Document,
    Documents,
    Full,
    LastQ,
    Mask,
    PerHead,
    RelativePosition,
    Shape,
    Sink,
    Softcap,
    Stride,
    VerticalSlash,
    VSIndices,
    Window,
    dense,
    dense_attention,
    errors,
)
from maskdsl.codegen.kernel import interpreting
from maskdsl.scores import ScoreMod, score_mod

HEADS, KV_HEADS, DIM = 4, 2, 16


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """FlexAttention says by warnings that it is slow without a compiler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def inputs(q_len: int, kv_len: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(q_len)
    return [torch.randn(2, h, n, DIM, generator=generator).to(dtype)
            for h, n in ((HEADS, q_len), (KV_HEADS, kv_len), (KV_HEADS, kv_len))]


def three_ways(mask: Mask, lengths: tuple[int, int], mods: tuple[ScoreMod, ...] = (),
               data: dict[str, Any] | None = None, theirs: Any = flex.flex_attention,
               block: int | tuple[int, int] = 128) -> None:
    """One call, three times."""
    q, k, v = inputs(*lengths)
    data = data or {}
    block_mask = mask.block_mask(*lengths, q_offset=0, batch=2, heads=HEADS, BLOCK_SIZE=block)
    out, lse = maskdsl.flex_attention(q, k, v, mods, mask, enable_gqa=True, return_lse=True,
                                      slots=data, backend="torch")
    modify = score_mod(mods, HEADS, data) if mods else None
    flexed = theirs(q, k, v, modify, block_mask, enable_gqa=True)
    assert torch.allclose(out, flexed, atol=1e-5)
    if not mods:
        live = dense(mask, Shape(*lengths, 0), 2, HEADS)
        exact, exact_lse = dense_attention(q.double(), k.double(), v.double(), live)
        assert torch.allclose(out.double(), exact, atol=1e-5)
        assert torch.equal(lse == -torch.inf, exact_lse == -torch.inf)
    back = maskdsl.flex_attention(q, k, v, mods, block_mask, enable_gqa=True, slots=data,
                                  backend="torch")
    assert torch.allclose(back, out, atol=1e-5)


@settings(max_examples=15)
@given(masks(), st.sampled_from([(60, 60), (40, 90), (90, 40)]), st.sampled_from([16, (32, 16)]))
def test_random_masks(mask: Mask, lengths: tuple[int, int], block: Any) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if max(lengths) <= limit:
        three_ways(mask, lengths, block=block)


TABLE = torch.linspace(-1, 1, 2 * HEADS * 17).view(2 * HEADS, 17)[:HEADS]
SCORED: list[tuple[tuple[ScoreMod, ...], dict[str, Any]]] = [
    ((Softcap(2.0),), {}), ((ALiBi(),), {}), ((Softcap(3.0), ALiBi()), {}),
    ((RelativePosition("table", 8),), {"table": TABLE}),
    ((Bias("bias"),), {"bias": torch.linspace(-2, 2, 70 * 70).view(1, 1, 70, 70)}),
]


@pytest.mark.parametrize(("mods", "data"), SCORED, ids=lambda x: repr(x)[:30])
def test_score_modifiers(mods: tuple[ScoreMod, ...], data: dict[str, Any]) -> None:
    three_ways(Causal() & (Sink(3) | Window(20)), (70, 70), mods, data)


def slot_masks() -> list[tuple[Mask, dict[str, Any]]]:
    """Masks with data, for 60 tokens."""
    index = torch.tensor([[[1, 30, 59], [0, 5, 9], [2, 2, -1], [7, 8, 60]]], dtype=torch.int32)
    live = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.4
    ids = torch.tensor([[0] * 20 + [1] * 40, [0] * 50 + [-1] * 10])
    return [
        (Causal() & (VerticalSlash("vs") | Window(4)), {"vs": VSIndices(index, index)}),
        (Blocks("b", 16, 16) - Sink(3), {"b": BlockIndices.from_mask(live, 16, 16)}),
        (Causal() & Document("d"), {"d": Documents.from_ids(ids)}),
        (PerHead([Causal(), Columns("c"), Full(), Columns("c") & Window(9)]),
         {"c": ColumnIndices(index)}),
    ]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("i", range(4))
def test_slots(i: int, backend: str) -> None:
    if backend == "triton" and not interpreting():
        pytest.skip("a GPU is here: see tests/gpu")
    mask, slots = slot_masks()[i]
    q, k, v = inputs(60, 60)
    made = mask.block_mask(60, batch=2, heads=HEADS, BLOCK_SIZE=16, slots=slots)
    ours = maskdsl.flex_attention(q, k, v, None, mask, enable_gqa=True, slots=slots,
                                  backend=backend)
    assert torch.allclose(ours, flex.flex_attention(q, k, v, None, made, enable_gqa=True),
                          atol=1e-5)
    live = dense(mask, Shape(60, 60), 2, HEADS, slots=slots)
    assert torch.allclose(ours, dense_attention(q, k, v, live)[0], atol=1e-5)


@pytest.mark.skipif(not interpreting(), reason="a GPU is here: see tests/gpu")
def test_a_block_mask_in_the_kernel() -> None:
    """Lists and function of a BlockMask, by the emitted kernel."""
    q, k, v = inputs(60, 60)
    mask = Causal() & (Sink(4) | Window(9))
    made = flex.create_block_mask(mask.mask_mod(), None, None, 60, 60, "cpu", 16)
    out = maskdsl.flex_attention(q, k, v, None, made, enable_gqa=True, backend="triton")
    assert torch.allclose(out, maskdsl.flex_attention(q, k, v, None, mask, enable_gqa=True,
                                                      backend="torch"), atol=1e-5)


@pytest.mark.slow
def test_compiled_flex_attention() -> None:
    """Compiled, FlexAttention walks the tables: full blocks without, partial ones with the mask."""
    compiled = torch.compile(flex.flex_attention)
    triangle = Causal() & (Sink(4) | Window(100) | LastQ(30))
    for mask in (triangle, PerHead([Causal() & Window(200), Causal() & Chunk(150) | Stride(7),
                                    Full(), Window(9, 9)])):
        three_ways(mask, (600, 600), theirs=compiled)
    q, k, v = inputs(60, 60)
    for mask, slots in slot_masks():
        made = mask.block_mask(60, batch=2, heads=HEADS, BLOCK_SIZE=16, slots=slots)
        theirs = compiled(q, k, v, None, made, enable_gqa=True)
        ours = maskdsl.flex_attention(q, k, v, None, mask, enable_gqa=True, slots=slots,
                                      backend="torch")
        assert torch.allclose(ours, theirs, atol=1e-5)
    three_ways(triangle, (300, 500), (Softcap(3.0), ALiBi()), theirs=compiled, block=(128, 64))


def test_the_signature_is_theirs() -> None:
    q, k, v = inputs(40, 40)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    ours = maskdsl.flex_attention(q, k, v, None, Causal(), 0.3, False)
    theirs = flex.flex_attention(q, k, v, None, Causal().block_mask(40), 0.3, False)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch.allclose(maskdsl.flex_attention(q, k, v), flex.flex_attention(q, k, v), atol=1e-6)
    out, aux = maskdsl.flex_attention(q, k, v, return_aux=flex.AuxRequest(lse=True))
    assert aux.lse.shape == (2, HEADS, 40) and aux.max_scores is None
    assert torch.equal(maskdsl.flex_attention(q, k, v, return_lse=True)[1], aux.lse)
    assert maskdsl.flex_attention(q, k, v, return_aux=flex.AuxRequest())[1].lse is None
    assert out.shape == q.shape


def test_slots_are_given_by_name() -> None:
    q, k, v = inputs(64, 64)
    live = torch.eye(4, dtype=torch.bool).view(1, 1, 4, 4)
    data = maskdsl.BlockIndices.from_mask(live, 16, 16)
    out = maskdsl.flex_attention(q, k, v, None, Blocks("b", 16, 16), enable_gqa=True,
                                 slots={"b": data})
    assert torch.allclose(out, maskdsl.flex_attention(q, k, v, None, Chunk(16), enable_gqa=True),
                          atol=1e-6)


@pytest.mark.parametrize(("arguments", "error", "told"), [
    ({"score_mod": lambda s, b, h, q, k: s * 2}, errors.ScoreModError, "Softcap.*ALiBi.*Bias.*"
     "RelativePosition.*SinkLogits"),
    ({"enable_gqa": False}, errors.HeadCountError, "enable_gqa=True"),
    ({"kernel_options": {"BLOCK_M": 64}}, errors.BackendError, "tile"),
    ({"return_aux": flex.AuxRequest(max_scores=True)}, errors.BackendError, "maximum"),
    ({"block_mask": lambda b, h, q, k: q >= k}, errors.MaskTypeError, "from_mask_mod"),
    ({"block_mask": Causal().block_mask(64)}, errors.ShapeError, "every length"),
])
def test_mistakes_are_told(arguments: dict[str, Any], error: type[Exception], told: str) -> None:
    q, k, v = inputs(40, 40)
    with pytest.raises(error, match=told):
        maskdsl.flex_attention(q, k, v, **{"enable_gqa": True, **arguments})
