"""Call-time data on the Hopper kernel against dense attention. Needs an H100 or H200.

`check_case` counts visible keys (k = 0, v one-hot), so a key seen twice fails, and holds the lse
tight.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dynamic_strategies import BATCH, HEADS, KV_HEADS, dynamic_masks, slot_data
from hopper_marks import NEEDS_HOPPER
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
    Prefix,
    PrefixLengths,
    Shape,
    Sink,
    TokenIndices,
    TokenTopK,
    VerticalSlash,
    VSIndices,
    Window,
)
from maskdsl.codegen.hopper_cut import refuse_mask
from maskdsl.dynamic import slots_of
from maskdsl.simplify import simplify

pytestmark = NEEDS_HOPPER

TRIANGLE = Sink(8) | Window(200) | LastQ(60)
FORCED = {"backend": "hopper"}


def moved(data: Any) -> Any:
    """Call-time data on the GPU."""
    for name, value in vars(data).items():
        if isinstance(value, torch.Tensor):
            object.__setattr__(data, name, value.cuda())
    return data


def make_data(mask: Mask, length: int, heads: int) -> dict[str, Any]:
    """Data for the mask's slots, with sentinels, duplicates, future keys and runs."""
    generator = torch.Generator().manual_seed(length + heads)

    def numbers(*size: int) -> torch.Tensor:
        return torch.randint(-1, length + 50, (1, heads, *size), generator=generator)

    runs = (numbers(9)[..., None] + torch.arange(64)).flatten(-2)
    live = torch.rand(1, heads, -(-length // 128), -(-length // 128), generator=generator) < 0.4
    ids = torch.sort(torch.randint(0, 4, (1, length), generator=generator)).values
    data = {"vs": VSIndices(numbers(90), runs), "loose": VSIndices(numbers(9), numbers(40)),
            "cols": ColumnIndices(numbers(200)), "idx": TokenIndices(numbers(length, 20)),
            "blk": BlockIndices.from_mask(live, 128, 128), "doc": Documents.from_ids(ids),
            "n": PrefixLengths(torch.tensor([length // 3]))}
    return {atom.slot: moved(data[atom.slot]) for atom in slots_of(mask)}


MASKS: list[Mask] = [
    VerticalSlash("vs"), VerticalSlash("loose"), TRIANGLE | VerticalSlash("vs"),
    VerticalSlash("vs") - Window(70), VerticalSlash("vs", "block64"), Columns("cols"),
    Columns("cols") | Sink(8), Columns("cols") | VerticalSlash("vs"),
    VerticalSlash("vs") | VerticalSlash("loose"), Blocks("blk", 128, 128),
    (Blocks("blk", 128, 128) | Sink(4)) | Window(128), Blocks("blk", 128, 128) - Window(64),
    Blocks("blk", 128, 128) | VerticalSlash("vs"), TokenTopK("idx"), TokenTopK("idx") | TRIANGLE,
    Document("doc") & Window(300), Document("doc") & VerticalSlash("vs")]


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_mask(mask: Mask, heads: int) -> None:
    """Lists for all heads, for each key/value head, and for each query head: each packs another
    number of heads."""
    for q_len, kv_len in ((1000, 1000), (130, 1000)):
        check_case(Case(mask, q_len, kv_len, 1, 8, 2, 128, options=FORCED, dtype=torch.bfloat16,
                        slots=make_data(mask, 1000, heads)), "cuda")


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (96, 96), (40, 40), (128, 64)])
def test_head_sizes(dim: int, value_dim: int) -> None:
    mask = TRIANGLE | VerticalSlash("vs")
    for heads in (2, 8):
        check_case(Case(mask, 700, 700, 1, 8, 2, dim, value_dim, options=FORCED,
                        dtype=torch.float16, slots=make_data(mask, 700, heads)), "cuda")


@settings(max_examples=6)  # each compiles kernels of its own
@given(dynamic_masks(), shapes(max_len=400), st.data())
def test_random_masks(mask: Mask, shape: Shape, data: st.DataObject) -> None:
    whole = simplify(mask)
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    slots = {name: moved(x) for name, x in data.draw(slot_data(mask, shape)).items()}
    if not slots_of(whole) or refuse_mask(whole, True) or \
            max(shape.q_offset + shape.q_len, shape.kv_len) > limit:
        return
    check_case(Case(mask, shape.q_len, shape.kv_len, BATCH, HEADS, KV_HEADS, 64, causal=False,
                    q_offset=shape.q_offset, total_len=shape.total_len, dtype=torch.bfloat16,
                    options=FORCED, slots=slots), "cuda")


def test_prefix() -> None:
    check_case(Case(Prefix("n"), 500, 500, 1, 4, 2, 64, causal=False, options=FORCED,
                    dtype=torch.bfloat16, slots=make_data(Prefix("n"), 500, 1)), "cuda")


@pytest.mark.parametrize("heads", [2, 8])
def test_other_lists_in_later_calls_and_other_layouts(heads: int) -> None:
    """Lists of another size, strided tensors, and the answer of the portable kernel."""
    mask = Causal() & (TRIANGLE | VerticalSlash("vs"))
    q, k, v = (torch.randn(2, 3000, h, 128, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))
    ours = maskdsl.compile(mask, backend="hopper", layout="blhd")
    other = maskdsl.compile(mask, backend="triton", layout="blhd")
    for length in (3000, 900):
        data = make_data(mask, length, heads)
        torch.testing.assert_close(ours(q, k, v, **data), other(q, k, v, **data), atol=0.02,
                                   rtol=0.02)


def test_graph_reads_lists_anew() -> None:
    mask = Causal() & VerticalSlash("vs")
    q, k, v = make_inputs(Case(mask, 1000, 1000, 1, 8, 2, 128, dtype=torch.bfloat16), "cuda")
    data, later = (make_data(mask, n, 8)["vs"] for n in (1000, 800))
    attn = maskdsl.compile(mask, backend="hopper")
    attn(q, k, v, vs=data)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn(q, k, v, vs=data)
    data.vertical.copy_(later.vertical)
    data.slash.copy_(later.slash)
    graph.replay()
    assert torch.equal(out, attn(q, k, v, vs=later))
