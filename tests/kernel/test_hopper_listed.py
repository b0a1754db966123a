"""The whole Hopper kernel of masks with call-time data, warp group by warp group, on the CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dynamic_strategies import BATCH, HEADS, KV_HEADS, dynamic_masks, slot_data
from gluon_machine import load_kernel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import shapes

from maskdsl import (
    BlockDiagonal,
    BlockIndices,
    Blocks,
    Causal,
    ColumnIndices,
    Columns,
    FirstQ,
    LastQ,
    Mask,
    PerHead,
    Shape,
    Sink,
    VerticalSlash,
    VSIndices,
    Window,
    dense,
    simplify,
)
from maskdsl.codegen import hopper, hopper_listed
from maskdsl.codegen.hopper import HopperForward
from maskdsl.codegen.hopper_cut import refuse_mask
from maskdsl.codegen.kernel import LOG2_E, output_maker
from maskdsl.dense import dense_attention
from maskdsl.dynamic import slots_of


@pytest.fixture
def on_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches run on the emulator; the rest of a call is what runs on a GPU."""
    def load(source: str) -> Any:
        made = load_kernel(source, "forward")
        made.seed = len(source)
        return SimpleNamespace(forward=made)

    monkeypatch.setattr(hopper, "load_module", load)
    monkeypatch.setattr(hopper_listed, "queue", lambda _: torch.zeros(2, dtype=torch.int32))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda _: SimpleNamespace(multi_processor_count=2))


def make_data(mask: Mask, length: int, heads: int) -> dict[str, Any]:
    """Lists with runs, sentinels, duplicates and entries beyond the end."""
    generator = torch.Generator().manual_seed(heads)

    def numbers(*size: int) -> torch.Tensor:
        return torch.randint(-1, length + 50, (1, heads, *size), generator=generator)

    runs = (numbers(4)[..., None] + torch.arange(64)).flatten(-2)
    live = torch.rand(1, heads, -(-length // 128), -(-length // 128), generator=generator) < 0.5
    data = {"vs": VSIndices(numbers(90), runs), "loose": VSIndices(numbers(9), numbers(12)),
            "cols": ColumnIndices(numbers(70)), "blk": BlockIndices.from_mask(live, 128, 128)}
    return {atom.slot: data[atom.slot] for atom in slots_of(mask)}


def check(whole: Mask, shape: Shape, data: dict[str, Any], sizes: tuple[int, int, int], dim: int,
          layout: str) -> None:
    """One call against dense attention; sizes: batch, query heads, key/value heads."""
    batch, heads, kv_heads = sizes
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(batch, h, n, dim, generator=generator).half() for h, n in (
        (heads, shape.q_len), (kv_heads, shape.kv_len), (kv_heads, shape.kv_len)))
    given = [t.transpose(1, 2).contiguous() if layout == "blhd" else t for t in (q, k, v)]
    views = [t.transpose(1, 2) if layout == "blhd" else t for t in given]
    call = HopperForward(whole).prepare(*views, shape, dim**-0.5 * LOG2_E,
                                        output_maker(views[0], dim, layout, True), True)
    out, lse = call(*given, data)
    live = dense(whole, shape, batch, heads, "cpu", data)
    exact, exact_lse = dense_attention(q.double(), k.double(), v.double(), live)
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-6, rtol=0)
    out = out.transpose(1, 2) if layout == "blhd" else out
    torch.testing.assert_close(out.double(), exact, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(("mask", "heads", "dim"), [
    (VerticalSlash("vs"), 4, 128), (VerticalSlash("vs"), 2, 64),
    (Sink(8) | Window(70) | LastQ(40) | VerticalSlash("vs"), 4, 64),
    (Sink(8) | Window(70) | VerticalSlash("vs"), 1, 64),
    (Columns("cols") | VerticalSlash("vs"), 4, 64), (Columns("cols"), 1, 64),
    (Blocks("blk", 128, 128) | Sink(4), 1, 128),
    (Blocks("blk", 128, 128) - Window(64), 4, 64),
    (VerticalSlash("loose") | Blocks("blk", 128, 128), 4, 64)], ids=repr)
def test_values_and_lse(mask: Mask, heads: int, dim: int, on_machine: None) -> None:
    """Lists for all heads, for pairs of them and for each: four, two and one head an item. The
    output is float16; the lse is exact."""
    whole = simplify(Causal() & mask)
    kv_heads = 2 if mask == Columns("cols") else 1  # one list, a copy for each key/value head
    check(whole, Shape(330, 460), make_data(whole, 460, heads), (1, 4, kv_heads), dim,
          "blhd" if dim == 64 else "bhld")


@settings(max_examples=5, suppress_health_check=list(HealthCheck))
@given(dynamic_masks(), shapes(max_len=200), st.data())
def test_random_masks(on_machine: None, mask: Mask, shape: Shape, data: st.DataObject) -> None:
    whole = simplify(mask)
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    slots = data.draw(slot_data(mask, shape))
    if not slots_of(whole) or refuse_mask(whole, by_name=True) or not shape.q_len or \
            not shape.kv_len or max(shape.q_offset + shape.q_len, shape.kv_len) > limit:
        return
    check(whole, shape, {atom.slot: slots[atom.slot] for atom in slots_of(whole)},
          (BATCH, HEADS, KV_HEADS), 64, "bhld")


def test_by_name_only() -> None:
    """Where the portable kernel is mostly faster, it is the default."""
    for mask in (VerticalSlash("vs"), Blocks("blk") - Window(64)):
        whole = simplify(Causal() & mask)
        assert "backend='hopper' takes it" in refuse_mask(whole)
        assert not refuse_mask(whole, by_name=True)
    assert "kind of head" in refuse_mask(PerHead([VerticalSlash("vs"), Sink(4)]), by_name=True)
    many = BlockDiagonal([100, 200, 300]) | Sink(3) | Window(9) | LastQ(5) | FirstQ(2)
    wide = simplify(many | VerticalSlash("vs"))
    assert "too many separate intervals" in refuse_mask(wide, by_name=True)
