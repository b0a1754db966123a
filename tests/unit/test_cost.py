"""The cost model: it says what was measured where it was fitted, and nothing where it was not."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskdsl import (
    BlockIndices,
    Blocks,
    Causal,
    ColumnIndices,
    Columns,
    Full,
    LastQ,
    ListSizes,
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
from maskdsl.codegen.cost import estimate_ms, find_rates, memory_bytes, predict
from maskdsl.codegen.forecast import (
    find_crossover,
    forecast,
    forecast_dense,
    tile_on,
    total_visited,
)
from maskdsl.codegen.packed import predict_packed
from maskdsl.codegen.tune import Config, pick_config
from maskdsl.codegen.visits import Visited
from maskdsl.codegen.workload import CallHeads, count_work
from maskdsl.errors import BackendError
from maskdsl.simplify import simplify

H100 = find_rates("H100")
CALL = CallHeads(1, 32, 8, 128, 128)


def measured_sweep(project: Path) -> list[dict[str, Any]]:
    """Calls of the portable kernel that were measured on an H100, at tiles that `tune` picks."""
    rows = json.loads((project / "docs/benchmarks/sweep.json").read_text())["rows"]
    chosen = {(128, "64x64", 4, 3), (128, "128x64", 8, 3), (64, "64x64", 4, 2),
              (64, "64x128", 4, 2)}
    return [row for row in rows
            if (row["dim"], row["tile"], row["warps"], row["stages"]) in chosen]


def test_measured_calls_are_predicted(project: Path) -> None:
    errors = []
    for row in measured_sweep(project):
        mask = Full() if row["mask"] == "dense causal" else eval(row["mask"])
        tile = tuple(map(int, row["tile"].split("x")))
        shape = Shape(row["length"], row["length"])
        call = CallHeads(1, 32, 8, row["dim"], row["dim"])
        works = count_work(simplify(Causal() & mask), tile, shape, call)  # type: ignore[arg-type]
        found = predict(H100, tile, shape, call, total_visited(works))  # type: ignore[arg-type]
        errors.append(abs(found.ms / row["ms"] - 1))
    assert len(errors) == 16
    assert median(errors) < 0.05 and max(errors) < 0.10, errors


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**5), st.integers(1, 10**4))
def test_more_steps_never_take_less(full: int, masked: int, columns: int, more: int) -> None:
    shape = Shape(4096, 4096)
    one = Visited(items=64, full=full, masked=masked, columns=columns)
    two = one.plus(Visited(full=more, slash=more))
    a, b = (predict(H100, (64, 64), shape, CALL, seen) for seen in (one, two))
    assert H100.call_ms <= a.ms <= b.ms
    assert a.kernel_ms == max(a.compute_ms, a.longest_ms, a.memory_ms, a.host_ms) == a.ms
    assert a.tile_tflop < b.tile_tflop


def test_each_bound_can_decide() -> None:
    def bound(shape: Shape, call: CallHeads, seen: Visited) -> str:
        return predict(H100, (64, 64), shape, call, seen).bound_by

    long = Shape(131072, 131072)
    assert bound(Shape(64, 64), CALL, Visited(items=32)) == "host"
    assert bound(long, CALL, Visited(items=65536, full=10**7)) == "compute"
    assert bound(Shape(64, 1 << 20), CALL, Visited(items=32)) == "memory"
    assert bound(Shape(64, 131072), CallHeads(), Visited(items=1, full=2048,
                                                         longest=2048)) == "longest item"
    assert memory_bytes(Shape(10, 20), CallHeads(2, 4, 2, 64, 32)) == 2 * 2 * (4 * 10 * 96
                                                                              + 2 * 20 * 96)


def test_what_was_not_measured_is_told() -> None:
    assert not forecast(Window(512), H100, Shape(8192, 8192), CALL).prediction.notes
    wide = CallHeads(1, 32, 8, 256, 256)
    notes = forecast(Window(512), H100, Shape(8192, 8192), wide).prediction.notes
    assert "not measured" in notes[0] and "scaled from" in notes[0]
    for chip, target in (("A100", "triton"), ("H100", "elsewhere")):
        with pytest.raises(BackendError, match="nothing was measured there"):
            find_rates(chip, target)
    with pytest.raises(BackendError, match="was not measured"):
        estimate_ms(H100, "guess", Shape(9, 9), CALL)


def test_estimates_grow_with_length_and_heads() -> None:
    long, short = Shape(131072, 131072), Shape(32768, 32768)
    assert estimate_ms(H100, "vertical_slash", long, CALL) == pytest.approx(1.676)
    assert estimate_ms(H100, "vertical_slash", short, CALL) == pytest.approx(1.676 / 4)
    assert estimate_ms(H100, "xattention", short, CallHeads(1, 64, 8)) == pytest.approx(
        14.01 / 16 * 2)


def near_blocks(length: int, block: int, most: int) -> torch.Tensor:
    row = torch.arange(-(-length // block))[:, None]
    return (row - torch.arange(most)[None, :])[None, None]


@pytest.mark.parametrize(("mask", "sizes", "slots"), [
    (VerticalSlash("vs") | Sink(4), {"vs": ListSizes(columns=300, slashes=500)},
     {"vs": VSIndices(torch.arange(300)[None, None], torch.arange(500)[None, None])}),
    (Columns("c") | Window(64), {"c": ListSizes(columns=200)},
     {"c": ColumnIndices(torch.arange(200)[None, None])}),
    (Blocks("b", 64, 64), {"b": ListSizes(blocks=5)},
     {"b": BlockIndices.from_topk(near_blocks(2048, 64, 5), 64, 64)}),
    (TokenTopK("t"), {"t": ListSizes(blocks=50)},
     {"t": TokenIndices(near_blocks(2048, 1, 50))}),
    (PerHead([Window(9), VerticalSlash("vs", "block64")] * 16),
     {"vs": ListSizes(columns=64, slashes=128)},
     {"vs": VSIndices(torch.arange(64)[None, None], torch.arange(128)[None, None])}),
])
def test_sizes_alone_count_as_lists_that_are_packed(mask: Mask, sizes: dict[str, ListSizes],
                                                    slots: dict[str, Any]) -> None:
    whole, shape = simplify(Causal() & mask), Shape(2048, 2048)
    packed = predict_packed(whole, H100, shape, CALL, sizes)
    real = forecast(whole, H100, shape, CALL, slots).prediction
    assert packed.compute_ms == pytest.approx(real.compute_ms, rel=0.02)
    assert packed.listing_ms == real.listing_ms == H100.listing_ms
    assert any("packed" in note for note in packed.notes)


def test_a_crossover_is_where_the_prediction_turns() -> None:
    mask = simplify(Causal() & (Sink(8) | Window(512) | LastQ(128)))
    length = find_crossover(mask, H100, CALL)
    assert length is not None and 512 < length < 8192

    def gain(n: int) -> float:
        shape = Shape(n, n)
        return forecast_dense(H100, shape, CALL).ms - forecast(mask, H100, shape,
                                                               CALL).prediction.ms

    assert gain(length) > 0 and gain(length - 256) <= 0
    assert find_crossover(Causal(), H100, CALL) is None
    assert find_crossover(VerticalSlash("vs"), H100, CALL) is None


def test_tiles_follow_the_blocks_of_the_lists() -> None:
    tall, low = Config(128, 64, 8, 3), Config(64, 64, 4, 3)
    assert pick_config("sm_90", 128, 128, 2, 0.0, 128) == tall
    assert pick_config("sm_90", 128, 128, 2, 0.0, 64) == low
    assert pick_config("sm_90", 128, 128, 2, 0.0) == low
    for mask, tile in ((Blocks("b", 128, 128), (128, 64)), (Blocks("b", 64, 64), (64, 64)),
                       (Blocks("b", 128, 128) | Sink(4) | Window(128), (128, 64)),
                       (Blocks("b", 128, 128) | VerticalSlash("vs"), (64, 64)),
                       (Blocks("b", 128, 128) | Blocks("c", 64, 64), (64, 64)),
                       (Window(100), (64, 64)), (Full(), (128, 64))):
        assert tile_on(simplify(Causal() & mask), "sm_90", CALL) == tile, mask
    assert tile_on(Causal(), "sm_90", CALL, (32, 32)) == (32, 32)
