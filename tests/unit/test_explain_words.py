"""What `explain` says in words, and that its numbers per class of rows are those of the call."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import masks

from maskdsl import (
    Band,
    BlockDiagonal,
    Causal,
    Chunk,
    Columns,
    Document,
    Documents,
    Empty,
    Full,
    KeyRange,
    LastQ,
    Mask,
    PerHead,
    Prefix,
    RandomBlocks,
    Shape,
    Sink,
    Slash,
    Stride,
    VerticalSlash,
    VSIndices,
    Where,
    Window,
    dense,
    explain,
)
from maskdsl.codegen.planner import make_plan
from maskdsl.codegen.row_classes import classify_rows
from maskdsl.codegen.words import describe_keys
from maskdsl.simplify import simplify
from maskdsl.spans import spans
from maskdsl.tiles import row_intervals
from maskdsl.trace import TRUE


def near(b: int, h: int, q: int, k: int) -> bool:
    return abs(q // 8 - k // 8) <= 1


@pytest.mark.parametrize(("mask", "words"), [
    (Full(), "all keys"), (Causal(), "all keys up to p"), (Sink(9), "the first 9 keys"),
    (Causal() & Sink(1), "the first key up to p"),
    (Causal() & Window(7), "the last 7 keys up to p"), (Window(3, 2), "keys p - 2 to p + 2"),
    (Slash([0]), "key p"), (Band(100, 20), "keys p - 119 to p - 100"),
    (KeyRange(10, 50), "keys 10 to 49"), (KeyRange(10, 11) & Causal(), "key 10 up to p"),
    (Window(9) - Sink(4), "the last 9 keys up to p, but not the first 4"),
    (Window(9) & Sink(40), "the last 9 keys up to p, of the first 40"),
    (Causal() - Window(30), "all keys up to p - 30"),
    (Chunk(8), "all keys in p's own chunk of 8"),
    (Causal() & Chunk(8), "all keys up to p in p's own chunk of 8"),
    (Where(near), "all keys in p's chunk of 8, in 1 before it and in 1 after it"),
    (Causal() & Where(near), "all keys up to p in p's chunk of 8, in 1 before it and in 1 after "
                             "it"),
    (Document("d"), "all keys in p's document (slot 'd')"),
    (Document("d") & Window(5), "the last 5 keys up to p in p's document (slot 'd')"),
    (Stride(3), "all keys, tested pair by pair for Stride(3)"),
    (RandomBlocks(4, 1) & Causal(), "all keys up to p, tested pair by pair for RandomBlocks(4, 1)"),
    (Columns("c"), "all keys that Columns('c') lists"),
    (Full() - Columns("c"), "all keys that Columns('c') does not list"),
])
def test_words_for_keys(mask: Mask, words: str) -> None:
    (row,) = classify_rows(make_plan(simplify(mask), 16, 16), Shape(50, 50))
    assert row.keys == (words,)


def test_words_for_unions() -> None:
    first, second = (classify_rows(make_plan(mask, 16, 16), Shape(50, 50))
                     for mask in (Prefix("n"), BlockDiagonal([5, 45])))
    assert first[0].keys == ("as many first keys as 'n' says", "all keys up to p")
    assert [row.keys for row in second] == [("the first 5 keys",), ("keys 5 to 49",)]
    assert (second[0].items, second[1].items) == (0, 4)  # query tiles go with their last row
    assert {describe_keys(piece) for piece in spans(~Chunk(8))} == {
        "all keys before p's chunk of 8", "all keys from the chunk of 8 after p's on"}


# --- the words say what the bounds say ------------------------------------------------------------

NUMBER = r"\d{1,3}(?:,\d{3})*"
PLACE = rf"(p(?: [+-] {NUMBER})?)"
FORMS = [
    (rf"all keys(?: up to {PLACE})?", lambda p, hi: (0, at(hi, p) + 1 if hi else math.inf)),
    (rf"the first (key|{NUMBER} keys)(?: up to {PLACE})?",
     lambda p, n, hi: (0, min(number(n), at(hi, p) + 1 if hi else math.inf))),
    (rf"the last ({NUMBER} keys) up to p", lambda p, n: (p + 1 - number(n), p + 1)),
    (rf"keys {PLACE} to {PLACE}", lambda p, lo, hi: (at(lo, p), at(hi, p) + 1)),
    (rf"key {PLACE}", lambda p, lo: (at(lo, p), at(lo, p) + 1)),
    (rf"keys from {PLACE} on", lambda p, lo: (at(lo, p), math.inf)),
    (rf"keys? ({NUMBER})(?: to ({NUMBER}))?(?: up to {PLACE})?",
     lambda p, a, b, hi: (number(a), min(number(b or a), at(hi, p) if hi else math.inf) + 1)),
]
LIMITS = [
    (rf", but not the first ({NUMBER})", lambda p, n: (number(n), math.inf)),
    (rf", of the first ({NUMBER})", lambda p, n: (0, number(n))),
    (rf" in p's own chunk of ({NUMBER})",
     lambda p, n: (p // number(n) * number(n), p // number(n) * number(n) + number(n))),
    (rf" in p's chunk of ({NUMBER})(?:, in (\d+) before it)?(?:(?: and|,) in (\d+) after it)?",
     lambda p, n, a, b: ((p // number(n) - number(a)) * number(n),
                         (p // number(n) + 1 + number(b)) * number(n))),
    (rf" before p's chunk of ({NUMBER})", lambda p, n: (0, p // number(n) * number(n))),
    (rf" from p's chunk of ({NUMBER}) on", lambda p, n: (p // number(n) * number(n), math.inf)),
    (rf" before the chunk of ({NUMBER}) after p's",
     lambda p, n: (0, (p // number(n) + 1) * number(n))),
    (rf" from the chunk of ({NUMBER}) after p's on",
     lambda p, n: ((p // number(n) + 1) * number(n), math.inf)),
]


def number(text: str | None) -> int:
    """12,345 keys  -->  12345; key  -->  1."""
    digits = re.sub(r"\D", "", text or "0")
    return int(digits) if digits else 1


def at(place: str, p: int) -> int:
    """The value of `p - 3`."""
    return p + int(place[1:].replace(" ", "").replace(",", "") or 0)


def read_words(words: str, p: int) -> tuple[float, float]:
    """The keys [lo, hi) that the words give row p."""
    begin = max((m for form, _ in FORMS if (m := re.match(form, words))), key=lambda m: m.end())
    lo, hi = next(f for form, f in FORMS if form == begin.re.pattern)(p, *begin.groups())
    rest = words[begin.end():]
    while rest:
        found, f = next((m, f) for form, f in LIMITS if (m := re.match(form, rest)))
        a, b = f(p, *found.groups())
        lo, hi, rest = max(lo, a), min(hi, b), rest[found.end():]
    return lo, hi


@given(masks(4), st.integers(0, 200))
def test_the_words_say_what_the_bounds_say(mask: Mask, p: int) -> None:
    shape = Shape(300, 300)
    for piece in spans(simplify(mask)):
        words = describe_keys(replace(piece, rest=TRUE))
        if words.startswith("keys ["):  # as computed
            continue
        free = replace(piece, first=(), last=())
        (lo,), (hi,) = row_intervals(free, np.array([p]), shape)
        first, stop = read_words(words, p)
        first, stop = max(first, 0), min(stop, 300)
        assert (first, stop) == (lo, hi) or (stop <= first and hi <= lo), words


# --- the other lines ------------------------------------------------------------------------------


def test_rows_count_what_the_data_of_the_call_says() -> None:
    documents = Documents.from_cu_seqlens(torch.tensor([0, 100, 150, 400]), 400)
    told = explain(Document("d"), 400, backend="torch", d=documents)
    (row,) = told.kinds[0].rows
    assert (row.full, row.masked) == (told.visited.full, told.visited.masked)
    assert explain(Document("d"), 400, backend="torch").visited.steps > told.visited.steps

    vs = VSIndices(torch.arange(0, 400, 9)[None, None], torch.arange(0, 400, 90)[None, None])
    listed = explain(Sink(2) | LastQ(7) | VerticalSlash("vs"), 400, backend="torch", vs=vs)
    rows = listed.kinds[0].rows
    assert len(rows) == 2 and sum(row.listed for row in rows) == listed.visited.listed > 0
    assert f"+ {rows[0].listed:,} listed tiles" in str(listed)


def test_where_heads_differ_it_is_said() -> None:
    told = explain(PerHead([Window(9), Causal(), Window(9), Stride(3)]), 300, backend="torch")
    assert [kind.which for kind in told.kinds] == [(0, 2), (1,), (3,)]
    text = str(told)
    assert "heads 0, 2: 9*N - 36 pairs for N tokens" in text
    assert "head 1: N**2/2 + N/2 pairs" in text
    assert "head 3, 0 to 299" in text
    assert told.to_dict()["kinds"][0]["which"] == [0, 2]


def test_a_closed_form_is_told_only_where_the_mask_reaches_it() -> None:
    assert explain(BlockDiagonal([100, 200]), 300, backend="torch").closed_form == ""
    assert explain(Window(9), 300, backend="torch").closed_form


def test_the_rates_behind_a_prediction_are_stated() -> None:
    told = explain(Window(64), 4096, backend="torch", chip="H100")
    assert told.prediction is not None
    assert any("docs/benchmarks" in source for source in told.prediction.sources)
    text = " ".join(str(told).split())
    assert all(source in text for source in told.prediction.sources)
    assert json.loads(json.dumps(told.to_dict()))["prediction"]["sources"]


def test_work_is_told_where_nothing_can_be_predicted() -> None:
    told = explain(Window(64) | VerticalSlash("vs"), 1000, backend="torch")
    text = " ".join(str(told).split())
    assert told.prediction is None and "MFLOP on live pairs" in text
    assert "what the data lists not counted" in text
    assert told.visited_flops == 2 * 256 * told.visited_pairs


def test_a_function_that_cannot_be_compiled_is_asked() -> None:
    table = torch.arange(64) % 3 == 0
    told = explain(Where(lambda b, h, q, k: table[k % 64]), 100, backend="torch")
    assert told.kinds[0].rows[0].keys == ("all keys up to p, each asked",)
    assert told.live_pairs == sum(p // 64 * 22 + p % 64 // 3 + 1 for p in range(100))


def test_an_empty_mask_visits_nothing() -> None:
    told = explain(Empty(), 500, backend="torch")
    assert math.isinf(told.tile_speedup) and "no tile is visited" in str(told)
    assert told.to_dict()["tile_speedup"] is None


def test_why_there_is_no_crossover() -> None:
    assert "at no length up to 131,072" in str(explain(Causal(), 500, backend="torch"))
    told = explain(RandomBlocks(64, 2), 500, backend="torch")
    assert told.crossover is None
    assert "every tile would have to be tested" in " ".join(str(told).split())
    told = explain(Document("d"), 500, backend="torch")
    assert told.crossover is None and "data of one length" in told.no_crossover
    assert max(map(len, str(told).splitlines())) <= 100


def test_markdown_and_html_keep_what_a_mask_is_called() -> None:
    told = explain(Where(near) | Window(3), 100, backend="torch")
    assert "Where(near) \\| Window(3)" in told.markdown()
    odd = explain(Where(lambda b, h, q, k: q - k < 3), 100, backend="torch")
    assert "&lt;lambda&gt;" in odd.markdown() and "<lambda>" not in odd.markdown()
    assert "&nbsp;&nbsp;" in odd.markdown()  # what is said of a class of rows stays under it
    assert "<lambda>" not in odd._repr_html_()


def test_live_pairs_of_the_words_add_up() -> None:
    told = explain(Sink(3) | Chunk(10), 95, backend="torch")
    total = sum(len(set().union(*(range(int(max(0, lo)), int(min(95, hi))) for lo, hi in (
        read_words(words, p) for words in row.keys))))
        for row in told.kinds[0].rows for p in range(row.first, row.stop))
    live = dense(Causal() & (Sink(3) | Chunk(10)), Shape(95, 95))
    assert total == told.live_pairs == int(live.sum())
