"""Runtime slots, alone and in random expressions: the torch backend and, in Triton's interpreter,
the kernels, against dense attention. `check_case` counts visible keys, so a key that a list and a
static loop both visit, or neither, shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dynamic_strategies import BATCH, HEADS, KV_HEADS, dynamic_masks, per_head_masks, slot_data
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, check_case, make_inputs
from strategies import shapes

import maskdsl
from maskdsl import (
    BlockIndices,
    Blocks,
    Causal,
    ColumnIndices,
    Columns,
    Document,
    Documents,
    LastQ,
    Mask,
    PerHead,
    Shape,
    Sink,
    VerticalSlash,
    VSIndices,
    Window,
    dense,
)
from maskdsl.codegen.kernel import interpreting
from maskdsl.dynamic import slots_of

interpreted = pytest.mark.skipif(not interpreting(), reason="a GPU is here: see tests/gpu")
TRIANGLE = Sink(4) | Window(40) | LastQ(20)


def check_random(mask: Mask, shape: Shape, slots: dict[str, Any], **options: Any) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        check_case(Case(mask, shape.q_len, shape.kv_len, BATCH, HEADS, KV_HEADS, 16, causal=False,
                        q_offset=shape.q_offset, total_len=shape.total_len, options=options,
                        slots=slots))


@settings(max_examples=60)
@given(st.data(), dynamic_masks(), shapes(max_len=90))
def test_torch_backend(data: st.DataObject, mask: Mask, shape: Shape) -> None:
    check_random(mask, shape, data.draw(slot_data(mask, shape)), backend="torch")


@interpreted
@settings(max_examples=50)
@given(st.data(), dynamic_masks(), shapes(max_len=90), st.sampled_from([(16, 16), (32, 32)]))
def test_kernels(data: st.DataObject, mask: Mask, shape: Shape, tile: tuple[int, int]) -> None:
    check_random(mask, shape, data.draw(slot_data(mask, shape)), backend="triton", tile=tile)


@interpreted
@settings(max_examples=20)
@given(st.data(), shapes(max_len=150), st.sampled_from([(64, 64), (64, 32), (32, 64), (128, 64)]))
def test_vertical_slash_with_a_triangle(data: st.DataObject, shape: Shape,
                                        tile: tuple[int, int]) -> None:
    """The tiles real kernels use, and static parts that overlap the lists on purpose."""
    mask = Causal() & (TRIANGLE | VerticalSlash("vs"))
    check_random(mask, shape, data.draw(slot_data(mask, shape)), backend="triton", tile=tile)


@interpreted
@settings(max_examples=12)
@given(st.data(), per_head_masks(), shapes(max_len=60))
def test_per_head(data: st.DataObject, mask: Mask, shape: Shape) -> None:
    check_random(mask, shape, data.draw(slot_data(mask, shape)), backend="triton", tile=(16, 16))
    check_random(mask, shape, data.draw(slot_data(mask, shape)), backend="torch")


def full_overlap(length: int) -> VSIndices:
    """Every key and every distance, twice: all that a static loop visits is listed too."""
    every = torch.arange(length).repeat(2)[None, None]
    return VSIndices(every, every)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("mask", [TRIANGLE | VerticalSlash("vs"), VerticalSlash("vs") - Window(9),
                                  VerticalSlash("vs") & Window(33), VerticalSlash("vs", "block64")])
def test_everything_listed_is_still_counted_once(mask: Mask, backend: str) -> None:
    check_case(Case(mask, 150, 150, dim=16, options={"backend": backend},
                    slots={"vs": full_overlap(150)}))


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
def test_no_index_at_all(backend: str) -> None:
    none = torch.full((1, 1, 3), -1)
    check_case(Case(VerticalSlash("vs"), 70, 70, dim=16, options={"backend": backend},
                    slots={"vs": VSIndices(none, none)}))
    out, lse = maskdsl.compile(Columns("c"), backend=backend)(
        *make_inputs(Case(Causal(), 40, 40, dim=16), "cpu"), return_lse=True, c=none)
    assert (out == 0).all() and (lse == -torch.inf).all()


@interpreted
def test_keys_far_ahead_of_the_queries() -> None:
    check_case(Case(Window(9, 2400) | VerticalSlash("vs"), 40, 2500, dim=16, causal=False,
                    q_offset=0, options={"backend": "triton", "tile": (32, 32)},
                    slots={"vs": full_overlap(60)}))


@interpreted
def test_a_chunk_brings_its_own_rows_of_blocks() -> None:
    whole = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.4
    for first in range(0, 128, 32):
        rows = BlockIndices.from_mask(whole[:, :, first // 16:first // 16 + 2], 16, 16)
        check_case(Case(Blocks("b", 16, 16) | Window(5), 32, 128, dim=16, q_offset=first,
                        options={"backend": "triton", "tile": (16, 16)}, slots={"b": rows}))


@interpreted
def test_documents_skip_tiles() -> None:
    ids = torch.arange(200)[None] // 50
    check_case(Case(Document("doc") & (Sink(100) | Window(20)), 200, 200, dim=16,
                    options={"backend": "triton"}, slots={"doc": Documents.from_ids(ids)}))


@interpreted
def test_a_per_head_mask_is_one_launch_with_the_costly_heads_first() -> None:
    mask = PerHead([Window(8), Causal(), Window(8), Causal()])
    attn = maskdsl.compile(mask, backend="triton")
    kinds = attn._forward.kinds  # type: ignore[union-attr]
    assert [heads for heads, _ in kinds] == [(1, 3), (0, 2)]
    check_case(Case(mask, 100, 100, 2, 4, 2, 16, options={"backend": "triton"}))


def test_the_superset_holds_the_exact_set() -> None:
    generator = torch.Generator().manual_seed(3)
    data = VSIndices(torch.randint(0, 400, (1, 2, 9), generator=generator),
                     torch.randint(0, 400, (1, 2, 12), generator=generator))
    exact, wide = (dense(Causal() & VerticalSlash("vs", kind), Shape(400, 400), 1, 2,
                         slots={"vs": data}) for kind in ("exact", "block64"))
    assert (wide | ~exact).all() and (wide & ~exact).any()


@interpreted
@pytest.mark.parametrize("masks", [
    [VerticalSlash("vs"), Columns("cols"), Window(32), Window(32)],
    [VerticalSlash("vs"), VerticalSlash("other"), Columns("cols"), Columns("more")]])
def test_heads_with_columns_of_different_slots(masks: list[Mask]) -> None:
    """All heads read one list of columns: each must tell its own among them."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*size: int) -> torch.Tensor:
        return torch.randint(-2, 47, size, generator=generator, dtype=torch.int32)

    made: dict[str, Any] = {
        "vs": VSIndices(numbers(1, 2, 10), numbers(1, 2, 30)),
        "other": VSIndices(numbers(1, 4, 7), numbers(1, 4, 9)),
        "cols": ColumnIndices(numbers(1, 2, 20)), "more": ColumnIndices(numbers(2, 1, 3))}
    mask = PerHead(masks) | Sink(10)
    check_random(mask, Shape(17, 44, 49, 82), {a.slot: made[a.slot] for a in slots_of(mask)},
                 backend="triton", tile=(16, 16))


@interpreted
def test_slots_in_the_other_layout() -> None:
    """[B, L, H, D] tensors: the second dimension is the length, not the number of heads."""
    mask = VerticalSlash("vs") | Sink(2)
    q, k, v = make_inputs(Case(mask, 70, 70, 2, 4, 2, 32), "cpu")
    found = {"vs": VSIndices(torch.randint(70, (2, 4, 5)), torch.randint(70, (2, 4, 6)))}
    expected = maskdsl.compile(mask, backend="triton")(q, k, v, **found)
    turned = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    out = maskdsl.compile(mask, backend="triton", layout="blhd")(*turned, **found)
    assert torch.equal(out.transpose(1, 2), expected)
