"""What `explain` counts, against the oracle; what it says, in every form."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from dynamic_strategies import BATCH, HEADS, KV_HEADS, dynamic_masks, per_head_masks, slot_data
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import masks, shapes, tile_sizes

import maskdsl
from maskdsl import (
    BlockIndices,
    Blocks,
    Causal,
    Columns,
    Document,
    Documents,
    Full,
    KeyRange,
    LastQ,
    Mask,
    PerHead,
    Shape,
    Sink,
    Stride,
    TokenIndices,
    TokenTopK,
    VerticalSlash,
    VSIndices,
    Where,
    Window,
    compile,
    dense,
)
from maskdsl.codegen.call_data import HeadData
from maskdsl.codegen.lists import group_heads
from maskdsl.codegen.live import count_live, count_ones, count_ones_by_sums
from maskdsl.codegen.planner import make_plan
from maskdsl.codegen.row_classes import classify_rows
from maskdsl.codegen.visits import count_visits, cover_slashes
from maskdsl.codegen.workload import CallHeads, count_work
from maskdsl.errors import BackendError, HeadCountError, MissingSlotError, SlotDataError
from maskdsl.heads import pick_head
from maskdsl.simplify import simplify

CALL = CallHeads(BATCH, HEADS, KV_HEADS, 16, 16)


def per_head_truth(mask: Mask, shape: Shape, data: dict[str, Any]) -> torch.Tensor:
    """Live pairs of every batch entry and head by the oracle, int[BATCH, HEADS]."""
    return dense(mask, shape, BATCH, HEADS, slots=data).sum((-1, -2))


@settings(max_examples=40)
@given(st.data(), dynamic_masks(), shapes(), tile_sizes())
def test_live_pairs_with_data_are_those_of_dense(
        data: st.DataObject, mask: Mask, shape: Shape, tile: tuple[int, int]) -> None:
    slots = data.draw(slot_data(mask, shape))
    whole = simplify(mask)
    works = count_work(whole, tile, shape, CALL, slots)
    assert sum(w.live_pairs or 0 for w in works) == int(per_head_truth(mask, shape, slots).sum())


@settings(max_examples=25)
@given(st.data(), per_head_masks(), shapes())
def test_every_kind_of_head_is_counted(data: st.DataObject, mask: Mask, shape: Shape) -> None:
    slots = data.draw(slot_data(mask, shape))
    whole = simplify(mask)
    truth = per_head_truth(mask, shape, slots)
    works = count_work(whole, (16, 16), shape, CALL, slots)
    kinds = group_heads(whole)
    assert sum(w.heads for w in works) == HEADS
    for work, (heads, _) in zip(works, kinds, strict=True):
        here = truth[:, list(heads)] if heads else truth
        assert work.live_pairs == int(here.sum())


@settings(max_examples=40)
@given(masks(3), shapes(), tile_sizes())
def test_static_steps_are_those_of_the_plan(mask: Mask, shape: Shape,
                                            tile: tuple[int, int]) -> None:
    plan = make_plan(simplify(mask), *tile)
    seen = count_visits(plan, shape)
    assert (seen.full, seen.masked) == plan.count_tiles(shape)
    assert seen.items == -(-shape.q_len // tile[0])
    visits = plan.visit(shape)
    steps = (visits.full.sum(1) + visits.masked.sum(1)).tolist()
    assert seen.longest == max(steps, default=0)


def brute_force_slash(mask: Mask, shape: Shape, data: HeadData, tile: tuple[int, int],
                      atom: VerticalSlash) -> int:
    """Slash tiles counted one by one: those that meet the reach and lie in no static hull."""
    plan = make_plan(mask, *tile)
    values = plan.run_bounds(shape, 0, 0, data.bound)
    marks = cover_slashes(data.slashes(atom), data.reach, *tile)
    lo, hi = (np.broadcast_to(eval(text, values), len(values["p_first"]))
              for text in plan.lists.reach)
    hulls = plan.segments(plan.lists.hulls, values)
    count = 0
    for i, first in enumerate(values["p_first"].tolist()):
        for d in marks.tolist():
            start = first - d
            inside = any(a[i] * tile[1] <= start and start + tile[1] <= b[i] * tile[1]
                         for a, b in hulls)
            # a hull that ends beyond the reach swallows a tile that only passes its end
            past = any(a[i] < b[i] and a[i] * tile[1] <= start and b[i] * tile[1] >= hi[i]
                       for a, b in hulls)
            count += start < hi[i] and start + tile[1] > lo[i] and not inside and not past
    return count


@settings(max_examples=30)
@given(st.data(), shapes(), tile_sizes(),
       st.sampled_from([Full(), Sink(20) | VerticalSlash("vs"),
                        Window(30) | Sink(9) | VerticalSlash("vs"),
                        LastQ(5) | VerticalSlash("vs")]))
def test_slash_and_column_steps_against_a_count_one_by_one(
        data: st.DataObject, shape: Shape, tile: tuple[int, int], mask: Mask) -> None:
    atom = VerticalSlash("vs")
    whole = simplify(Causal() & (atom if mask == Full() else mask))
    if not whole.below() or atom not in list(whole.walk()):
        return
    held = HeadData(data.draw(slot_data(whole, shape)), shape, 0, 0, HEADS)
    plan = make_plan(whole, *tile)
    seen = count_visits(plan, shape, held)
    assert seen.slash == brute_force_slash(whole, shape, held, tile, atom)
    values = plan.run_bounds(shape, 0, 0, held.bound)
    if not len(values["p_first"]):
        return
    hulls = plan.segments(plan.lists.hulls, values)
    lo, hi = (np.broadcast_to(eval(t, values), len(values["p_first"])) for t in plan.lists.reach)
    steps = 0
    for i in range(len(values["p_first"])):
        loose = [c for c in held.columns(atom).tolist() if lo[i] <= c < hi[i] and not any(
            a[i] * tile[1] <= c < b[i] * tile[1] for a, b in hulls)]
        steps += -(-len(loose) // tile[1])
    assert seen.columns == steps


def test_bits_are_counted_alike_with_old_numpy() -> None:
    words = np.random.default_rng(0).integers(0, 1 << 64, (7, 9), dtype=np.uint64)
    expected = sum(bin(int(x)).count("1") for x in words.ravel())
    assert count_ones(words) == count_ones_by_sums(words) == expected


def test_long_lists_need_no_square_of_memory_or_time() -> None:
    """64K tokens: |V or S| by inclusion and exclusion of the two sets."""
    length = 65536
    generator = torch.Generator().manual_seed(3)
    columns = torch.randperm(length, generator=generator)[:50]
    slashes = torch.randperm(length, generator=generator)[:60]
    data = HeadData({"vs": VSIndices(columns[None, None], slashes[None, None])},
                    Shape(length, length), 0, 0, 1)
    found = count_live(simplify(Causal() & VerticalSlash("vs")), data)
    both = (columns[:, None] + slashes[None, :] < length).sum()
    assert found == int((length - columns).sum() + (length - slashes).sum() - both)


# --- what a user sees -----------------------------------------------------------------------------


def lists(heads: int = 1) -> VSIndices:
    vertical = torch.arange(0, 240, 12).expand(1, heads, -1) + torch.arange(heads)[None, :, None]
    return VSIndices(vertical, torch.arange(40).expand(1, heads, -1) * 5)


def test_explain_counts_the_lists_of_a_call() -> None:
    attn = compile(Sink(4) | Window(32) | VerticalSlash("vs"), backend="torch")
    told = attn.explain(500, vs=lists(4), kv_heads=2)
    truth = dense(attn.mask, Shape(500, 500), 1, 4, slots={"vs": lists(4)})
    assert told.call.heads == 4 and told.call.kv_heads == 2
    assert told.live_pairs == int(truth.sum())
    assert told.listed_tiles > 0 and told.column_steps > 0
    text = str(told)
    assert "counted with the data given" in text and "at listed distances" in text
    assert "measured rates below, not a measurement" in text and "H100" in text
    assert told.prediction is not None and told.prediction.listing_ms > 0
    one = attn.explain(500, vs=lists(1), heads=8)
    assert one.live_pairs == 8 * int(dense(attn.mask, Shape(500, 500), slots={
        "vs": lists(1)}).sum())


def test_explain_of_per_head_tells_each_kind_and_totals() -> None:
    mask = PerHead([Causal(), Window(16), VerticalSlash("vs"), Window(16)])
    attn = compile(mask, backend="torch")
    told = attn.explain(300, vs=lists())
    truth = dense(attn.mask, Shape(300, 300), 1, 4, slots={"vs": lists()}).sum((-1, -2))[0]
    assert [(kind.heads, kind.live_pairs) for kind in told.kinds] == [
        (1, int(truth[0])), (2, int(truth[1] + truth[3])), (1, int(truth[2]))]
    assert told.live_pairs == int(truth.sum())
    assert "heads 1, 3: Window(16)" in str(told)
    assert told.visited.steps == sum(kind.visited.steps for kind in told.kinds)


def test_explain_reads_documents_and_batches() -> None:
    attn = compile(Document("d") & Window(20), backend="torch")
    documents = Documents.from_ids(torch.tensor([[0] * 50 + [1] * 50, [2] * 10 + [3] * 90]))
    told = attn.explain(100, d=documents)
    assert told.call.batch == 2
    assert told.live_pairs == int(dense(attn.mask, Shape(100, 100), 2,
                                        slots={"d": documents}).sum())
    assert attn.explain(100).live_pairs == int(dense(Causal() & Window(20),
                                                     Shape(100, 100)).sum())


@pytest.mark.parametrize(("mask", "slots"), [
    (Blocks("b", 16, 16), {"b": BlockIndices.from_topk(torch.tensor([[[[0, 1], [1, -1]]]]), 16,
                                                       16)}),
    (TokenTopK("t") | Sink(2), {"t": TokenIndices(torch.randint(0, 32, (1, 2, 32, 3)))}),
    (Columns("c") - Window(9), {"c": torch.tensor([[[1, 5, 30]]])}),
    (Stride(3) & VerticalSlash("vs", "block64"), {"vs": lists()}),
])
def test_explain_of_every_kind_of_list(mask: Mask, slots: dict[str, Any]) -> None:
    attn = compile(mask, backend="torch")
    told = attn.explain(32, **slots)
    shape = Shape(32, 32)
    truth = dense(attn.mask, shape, 1, told.call.heads, slots={
        name: maskdsl.ColumnIndices(x) if isinstance(x, torch.Tensor) else x
        for name, x in slots.items()})
    assert told.live_pairs == int(truth.sum())


def test_a_function_that_cannot_be_compiled_is_counted_pair_by_pair() -> None:
    def odd(b: Any, h: Any, q: Any, k: Any) -> Any:
        return torch.as_tensor(q * k) % 3 == 0

    told = compile(Where(odd) & Window(40), backend="torch").explain(100)
    assert told.live_pairs == int(dense(Causal() & Where(odd) & Window(40),
                                        Shape(100, 100)).sum())
    assert told.prediction is None and "cannot be compiled" in str(told)


def test_the_laws_and_a_mask_that_is_dense_here_are_told() -> None:
    told = compile(Window(2048) | Sink(3) | Sink(8), backend="torch").explain(1024)
    assert told.is_dense and "dense at this length" in str(told)
    assert any("Sink(max(a, b))" in law for law in told.laws) and "laws used" in str(told)
    assert not compile(Window(8), backend="torch").explain(1024).is_dense
    assert told.fallback == ""  # a mask a user compiled is never replaced


def test_every_form_says_the_same() -> None:
    told = compile(PerHead([Causal(), Window(16) | VerticalSlash("vs")]), backend="torch").explain(
        256, vs=lists(), estimator="vertical_slash")
    data = json.loads(json.dumps(told.to_dict()))
    assert data["live_pairs"] == told.live_pairs == sum(k["live_pairs"] for k in data["kinds"])
    assert data["prediction"]["ms"] == told.prediction.ms  # type: ignore[union-attr]
    assert data["prediction"]["estimate_ms"] > 0
    assert data["flops"] == 4 * 128 * told.live_pairs  # type: ignore[operator]
    for form in (str(told), told.markdown(), told._repr_html_()):
        assert f"{told.live_pairs:,}" in form and "predicted" in form
    assert "\\|" in told.markdown() and "<table>" in told._repr_html_()
    assert "kernel" in told.graph and told.graph.number_of_nodes() > 5


def test_rows_are_told_in_words_and_add_up() -> None:
    mask = Sink(4) | Window(300) | LastQ(64) | KeyRange(100, 200)
    told = compile(mask, backend="torch").explain(1000)
    (kind,) = told.kinds
    early, late = kind.rows
    assert (early.first, early.stop, late.first, late.stop) == (0, 936, 936, 1000)
    assert set(early.keys) == {"the first 4 keys up to p", "the last 300 keys up to p",
                               "keys 100 to 199 up to p"}
    assert "all keys up to p" in late.keys and "all keys up to p" not in early.keys
    assert sum(row.items for row in kind.rows) == 8
    assert sum(row.full for row in kind.rows) == told.full_tiles
    assert sum(row.masked for row in kind.rows) == told.masked_tiles
    assert "936 to 999" in str(told)


@settings(max_examples=30)
@given(st.data(), st.one_of(masks(3), dynamic_masks(3)), shapes())
def test_classes_of_rows_cover_every_row_and_tile(data: st.DataObject, mask: Mask,
                                                  shape: Shape) -> None:
    plan = make_plan(simplify(mask), 16, 16)
    rows = classify_rows(plan, shape)
    assert [row.first for row in rows[1:]] == [row.stop for row in rows[:-1]]
    if shape.q_len:
        assert rows[0].first == 0 and rows[-1].stop == shape.q_len
    assert sum(row.items for row in rows) == -(-shape.q_len // 16)
    assert (sum(r.full for r in rows), sum(r.masked for r in rows)) == plan.count_tiles(shape)


def test_an_expression_is_explained_without_compiling_it_first() -> None:
    told = maskdsl.explain(Window(4), 100, backend="torch")
    assert told.live_pairs == int(dense(Causal() & Window(4), Shape(100, 100)).sum())
    both = maskdsl.explain(Window(4, 2), 100, causal=False, backend="torch", heads=3)
    assert both.live_pairs == 3 * int(dense(Window(4, 2), Shape(100, 100)).sum())


def test_slots_without_data_are_named() -> None:
    for mask, words in ((VerticalSlash("vs"), "VerticalSlash('vs') decides, and its data was"),
                        (VerticalSlash("vs") | Columns("c"), "decide, and their data was")):
        told = maskdsl.explain(mask, 100, chip="H100", backend="torch")
        assert words in told.no_prediction


def test_rich_prints_the_same() -> None:
    console = pytest.importorskip("rich.console")
    made = console.Console(width=120, record=True, file=io.StringIO())
    told = compile(Sink(4) | Window(16), backend="torch").explain(100)
    made.print(told)
    text = made.export_text()
    assert f"{told.live_pairs:,}" in text and "[max(0" not in text and "predicted" in text


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"chip": "A100"}, BackendError, "nothing was measured there"),
    ({"estimator": "guess", "vs": lists()}, BackendError, "it was not measured"),
    ({"vs": torch.zeros(1, 1, 3)}, SlotDataError, "takes VSIndices"),
    ({"other": lists()}, maskdsl.errors.UnknownSlotError, "no slot named"),
    ({"heads": 3, "kv_heads": 2}, HeadCountError, "cannot share"),
    ({"heads": 3, "vs": lists(2)}, SlotDataError, "for 2 heads"),
])
def test_mistakes_are_told(options: dict[str, Any], error: type[Exception], words: str) -> None:
    attn = compile(VerticalSlash("vs") | Sink(2), backend="torch")
    with pytest.raises(error, match=words):
        attn.explain(100, **options)


def test_some_data_means_all_data() -> None:
    attn = compile(VerticalSlash("vs") | Columns("c"), backend="torch")
    with pytest.raises(MissingSlotError, match="Columns"):
        attn.explain(100, vs=lists())
    with pytest.raises(HeadCountError):
        compile(PerHead([Sink(1), Full()]), backend="torch").explain(9, heads=3)
    assert pick_head(PerHead([Sink(1), Full()]), 1) == Full()
