"""The host's count of listed tiles, against the lists that the kernels make."""

from __future__ import annotations

import pytest
import torch
from dynamic_strategies import BATCH, HEADS, KV_HEADS, dynamic_masks, slot_data
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import shapes

from maskdsl import Blocks, Mask, Shape, Sink, TokenTopK, VerticalSlash, Window
from maskdsl.codegen.call_data import HeadData
from maskdsl.codegen.kernel import TritonForward, interpreting, slot_arguments
from maskdsl.codegen.listing import Parameter
from maskdsl.codegen.tune import Config
from maskdsl.codegen.visits import count_visits
from maskdsl.simplify import simplify

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU is here: see tests/gpu")

TABLES = st.sampled_from([Blocks("blk", 16, 16), Blocks("odd", 24, 8), Blocks("big", 64, 64),
                          TokenTopK("idx"), VerticalSlash("wide", "block64")])


@settings(max_examples=20)
@given(st.data(), st.one_of(TABLES, st.tuples(TABLES, TABLES).map(lambda ab: ab[0] | ab[1]),
                            TABLES.map(lambda a: a | Window(9) | Sink(3)),
                            TABLES.map(lambda a: Window(40) - a),
                            dynamic_masks(3)),
       shapes(), st.sampled_from([(16, 16), (32, 16), (16, 32)]))
def test_listed_tiles_are_those_of_the_kernel(data: st.DataObject, mask: Mask, shape: Shape,
                                              tile: tuple[int, int]) -> None:
    mask = simplify(mask)
    slots = data.draw(slot_data(mask, shape))
    variant = TritonForward(mask, Config(*tile, 4, 1)).variant("cpu", torch.float32, 16, 16, 1,
                                                               False, False)
    plan = variant.plans[0]
    if not plan.lists.tables or not shape.q_len or not shape.kv_len:
        return
    q, k = (torch.zeros(BATCH, heads, length, 16) for heads, length in (
        (HEADS, shape.q_len), (KV_HEADS, shape.kv_len)))
    found = variant.parameters
    made = slot_arguments(variant, found, slots, shape, q.shape[1], q, k, k)
    at = {p.name: value for p, value in zip(found, made, strict=True)}
    counts, share = at["union_tile_counts"], at["union_tile_share"]
    assert Parameter("union_tile_counts", True) in found
    for batch in range(BATCH):
        for head in range(HEADS):
            here = counts[min(batch, counts.shape[0] - 1), head // share].sum(0).tolist()
            seen = count_visits(plan, shape, HeadData(slots, shape, batch, head, HEADS), batch,
                                head)
            assert [seen.listed_full, seen.listed_part] == here
