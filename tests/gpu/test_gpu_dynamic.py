"""Runtime slots on a real GPU: every listed loop against dense attention. Needs CUDA."""

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
    Columns,
    Document,
    Documents,
    Full,
    LastQ,
    Mask,
    PerHead,
    Shape,
    Sink,
    TokenIndices,
    TokenTopK,
    VerticalSlash,
    VSIndices,
    Window,
)
from maskdsl.binding import widen_slashes
from maskdsl.codegen.tables import widen
from maskdsl.patterns import estimate

pytestmark = pytest.mark.gpu

TRIANGLE = Sink(8) | Window(200) | LastQ(60)
LENGTH = 1000


def moved(data: Any) -> Any:
    """Call-time data on the GPU."""
    for name, value in vars(data).items():
        if isinstance(value, torch.Tensor):
            object.__setattr__(data, name, value.cuda())
    return data


def make_data(length: int = LENGTH, heads: int = 4) -> dict[str, Any]:
    """Data for every slot these tests name, with sentinels, duplicates and future keys."""
    generator = torch.Generator().manual_seed(length)

    def numbers(*size: int) -> torch.Tensor:
        return torch.randint(-1, length + 50, (1, heads, *size), generator=generator)

    runs = (numbers(9)[..., None] + torch.arange(64)).flatten(-2)
    rows = -(-length // 64)
    live = torch.rand(1, heads, rows, rows, generator=generator) < 0.3
    tokens = numbers(length, 40)
    data = {"vs": VSIndices(numbers(70), runs), "blk": BlockIndices.from_mask(live, 64, 64),
            "fine": BlockIndices.from_topk(numbers(-(-length // 16), 9) // 16, 16, 16),
            "cols": maskdsl.ColumnIndices(numbers(50)), "idx": TokenIndices(tokens),
            "doc": Documents.from_ids((torch.arange(length) // 130)[None])}
    return {name: moved(value) for name, value in data.items()}


MASKS: list[tuple[Mask, tuple[str, ...]]] = [
    (VerticalSlash("vs"), ("vs",)),
    (TRIANGLE | VerticalSlash("vs"), ("vs",)),
    (VerticalSlash("vs", "block64") | Sink(3), ("vs",)),
    (VerticalSlash("vs") - Window(100), ("vs",)),
    (Blocks("blk") | Sink(4) | Window(128), ("blk",)),
    (Blocks("blk") - Window(64), ("blk",)),
    (Full() - Blocks("blk"), ("blk",)),
    (Blocks("fine", 16, 16) | VerticalSlash("vs"), ("fine", "vs")),
    (Columns("cols") | Window(64), ("cols",)),
    (TokenTopK("idx") | Sink(1), ("idx",)),
    (Document("doc") & (Sink(500) | Window(70) | VerticalSlash("vs")), ("doc", "vs")),
    (PerHead([Window(10) | VerticalSlash("vs"), Blocks("blk"), Full(), Full()]) | Sink(2),
     ("vs", "blk")),
]


@pytest.mark.parametrize(("mask", "names"), MASKS, ids=lambda x: repr(x)[:40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mask(mask: Mask, names: tuple[str, ...], dtype: torch.dtype) -> None:
    data = make_data()
    check_case(Case(mask, LENGTH, LENGTH, 2, 4, 2, 64, dtype=dtype,
                    slots={name: data[name] for name in names}), "cuda")


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 80), (128, 128), (192, 128),
                                                (256, 256)])
def test_head_sizes(dim: int, value_dim: int) -> None:
    check_case(Case(TRIANGLE | VerticalSlash("vs"), LENGTH, LENGTH, 1, 4, 2, dim, value_dim,
                    torch.bfloat16, slots={"vs": make_data()["vs"]}), "cuda")


def test_lengths_and_offsets() -> None:
    for q_len, kv_len, offset in [(1, 1000, None), (333, 1000, None), (300, 1000, 400),
                                  (2048, 2048, None)]:
        check_case(Case(TRIANGLE | VerticalSlash("vs"), q_len, kv_len, 1, 4, 2, 128,
                        dtype=torch.bfloat16, q_offset=offset, slots={"vs": make_data()["vs"]}),
                   "cuda")


def check_random(data: st.DataObject, mask: Mask, shape: Shape) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    slots = {name: moved(value) for name, value in data.draw(slot_data(mask, shape)).items()}
    if max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        check_case(Case(mask, shape.q_len, shape.kv_len, BATCH, HEADS, KV_HEADS, 64,
                        dtype=torch.float16, causal=False, q_offset=shape.q_offset,
                        total_len=shape.total_len, slots=slots), "cuda")


@settings(max_examples=25, deadline=None)
@given(st.data(), dynamic_masks(), shapes(max_len=300))
def test_random_masks(data: st.DataObject, mask: Mask, shape: Shape) -> None:
    check_random(data, mask, shape)


@settings(max_examples=8, deadline=None)
@given(st.data(), per_head_masks(), shapes(max_len=300))
def test_random_heads(data: st.DataObject, mask: Mask, shape: Shape) -> None:
    check_random(data, mask, shape)


def test_supersets_follow_the_rule() -> None:
    slash = torch.randint(-1, 5000, (1, 2, 200), device="cuda")
    words = widen(slash, Shape(3000, 3000))
    place = torch.arange(3000, device="cuda")
    assert torch.equal(((words[..., place // 32] >> (place % 32)) & 1).bool(),
                       widen_slashes(slash, Shape(3000, 3000)))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_no_host_sync_and_one_graph() -> None:
    case = Case(TRIANGLE | VerticalSlash("vs"), 2048, 2048, 1, 4, 2, 128, dtype=torch.bfloat16)
    q, k, v = make_inputs(case, "cuda")
    attn = maskdsl.compile(case.mask)
    first = estimate.vertical_slash(q, k, 100, 300)
    expected = attn(q, k, v, vs=first)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attn(q, k, v, vs=estimate.vertical_slash(q, k, 100, 300))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    held = VSIndices(first.vertical.clone(), first.slash.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn(q, k, v, vs=held)
    graph.replay()
    assert torch.equal(out, expected)
    held.slash.fill_(-1)  # the graph reads the indices anew
    graph.replay()
    assert torch.equal(out, attn(q, k, v, vs=held)) and not torch.equal(out, expected)


def test_one_kernel_for_every_length() -> None:
    mask = VerticalSlash("vs") | Sink(37)  # that no other test here compiles
    attn = maskdsl.compile(mask, backend="triton")
    for length in (100, 128, 777, 1024):
        q, k, v = make_inputs(Case(Causal(), length, length, 1, 4, 2, 64, dtype=torch.float16),
                              "cuda")
        attn(q, k, v, vs=make_data(length)["vs"])
    (variant,) = attn._forward.variants.values()  # type: ignore[union-attr]
    (cache,) = variant.forward.device_caches.values()
    assert len(cache[0]) == 1
