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
from oracle import Case
from score_oracle import make_data, some_mods
from strategies import masks, shapes

from maskdsl import (
    Mask,
    Shape,
)
from maskdsl.codegen.kernel import interpreting

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
            options={"backend": "triton", "backward": True, "tile": tile}, **more))


@settings(max_examples=8)
@given(st.data(), dynamic_masks(), shapes(max_len=90), TILES, DTYPES)
def test_slots(data: st.DataObject, mask: Mask, shape: Shape, tile: tuple[int, int],
               dtype: torch.dtype) -> None:
    check_random(mask, shape, data.draw(slot_data(mask, shape)), tile, dtype=dtype)


@settings(max_examples=4)
@given(st.data(), per_head_masks(), shapes(max_len=60), TILES)
def test_kinds_of_heads(data: st.DataObject, mask: Mask, shape: Shape,
                        tile: tuple[int, int]) -> None:
    check_random(mask, shape, data.draw(slot_data(mask, shape)), tile)


LEADS = st.sampled_from([(1, 1), (BATCH, HEADS), (1, HEADS)])


@settings(max_examples=6)
@given(st.data(), st.one_of(masks(3), dynamic_masks(3), per_head_masks()), shapes(max_len=50),
       some_mods(), LEADS, TILES)
def test_scores(data: st.DataObject, mask: Mask, shape: Shape, mods: Any,
                lead: tuple[int, int], tile: tuple[int, int]) -> None:
    check_random(mask, shape, data.draw(slot_data(mask, shape)), tile, scores=mods,
                 data=make_data(mods, shape, 0, lead))
