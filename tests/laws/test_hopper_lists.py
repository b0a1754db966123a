"""The Hopper kernel's text for masks with call-time data, run on numbers: every pair kept once.

The small kernels that prepare lists run in Triton's interpreter; what the Gluon file does with
their results is executed as Python (`test_hopper_text`) for every item, warp group and pair.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from dynamic_strategies import BATCH, HEADS, KV_HEADS, dynamic_masks, slot_data
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import shapes

from maskdsl import (
    BlockIndices,
    Blocks,
    Causal,
    ColumnIndices,
    Columns,
    LastQ,
    Mask,
    Shape,
    Sink,
    VerticalSlash,
    VSIndices,
    Window,
    dense,
    simplify,
)
from maskdsl.codegen.emit_hopper_listed import emit_listed
from maskdsl.codegen.emit_hopper_lists import (
    column_limit,
    has_sides,
    kernel_parameters,
    numbers_of,
    state_line,
)
from maskdsl.codegen.hopper_cut import BLOCK_N, GRAIN, TILE
from maskdsl.codegen.hopper_lists import (
    ListedKernels,
    copy_columns,
    heads_told_apart,
    pick_listed,
    refuse_listed,
    schedule_listed,
)
from maskdsl.codegen.planner import make_plan
from maskdsl.dynamic import slots_of
from maskdsl.text import NUMPY_NAMES


class Pointer:
    """A pointer into a tensor's numbers, as `gl.load` takes it."""

    def __init__(self, numbers: npt.NDArray[np.int64], place: Any = 0) -> None:
        self.numbers, self.place = numbers, place

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.numbers, self.place + offset)


def load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Any:
    place = np.where(mask, pointer.place, 0)
    assert ((place >= 0) & (place < len(pointer.numbers)))[np.broadcast_to(mask, place.shape)].all()
    found = np.where(mask, pointer.numbers[np.clip(place, 0, len(pointer.numbers) - 1)], other)
    return found[()]


def unsigned(word: Any) -> Any:
    return word & 0xFFFFFFFF


HELPERS = {
    "floor_div": lambda a, b: a // b, "modulo": lambda a, b: a % b,
    "divide": lambda a, divisor, _: a // divisor,
    "below": lambda bound: (np.int64(1) << np.clip(bound, 0, 32)) - 1,
    "count_bits": lambda word: np.vectorize(lambda w: int(w & 0xFFFFFFFF).bit_count())(word),
    "funnel": lambda near, far, shift: unsigned((unsigned(near) | (unsigned(far) << 32)) >> shift),
    "gather_bits": lambda held: int((held.astype(np.int64) << np.arange(32)).sum()),
}


def run_text(source: str) -> dict[str, Any]:
    """The scalar functions of an emitted file as Python functions."""
    start, stop = source.index("FAR = "), source.index("@gluon.jit\ndef hardware_barrier")
    text = source[start:stop].replace("@gluon.jit\n", "").replace(".to(gl.int64)", "")
    text = re.sub(r"def (mask_\w+|read_sides|load_\w+|side_words|pair_words)\(.*?(?=\n\n\n)", "",
                  text, flags=re.DOTALL)
    gl = SimpleNamespace(**vars(NUMPY_NAMES["tl"]), constexpr=lambda x: x, load=load,
                         cast=lambda x, _: x, int64=None, BlockedLayout=lambda *_: None,
                         arange=lambda a, b, layout: np.arange(a, b),
                         expand_dims=np.expand_dims)
    names: dict[str, Any] = {"gl": gl}
    exec(text, names)
    names.update(HELPERS)
    return names


class ListedWalk:
    """All items of one call, pair by pair."""

    def __init__(self, mask: Mask, shape: Shape, data: dict[str, Any]) -> None:
        group = HEADS // KV_HEADS
        probe = make_plan(mask, 128, GRAIN, TILE)
        kinds = heads_told_apart(probe, data, HEADS)
        self.config = config = pick_listed(mask, group, HEADS // kinds, 64)
        self.shape = shape
        self.plan = make_plan(mask, config.span, GRAIN, TILE)
        self.numbers = numbers_of(self.plan).names[2:]
        kernels = ListedKernels(self.plan)
        tables = kernels.prepare(shape, BATCH, HEADS, KV_HEADS, data,
                                 torch.device("cpu"))
        self.keys = None
        if self.plan.lists.columns:
            numbers = torch.arange(shape.kv_len, dtype=torch.float32)  # each key's row tells itself
            source = numbers[None, None, :, None].expand(BATCH, KV_HEADS, -1, 8).contiguous()
            copies = copy_columns(tables, source)
            self.keys = copies[..., 0].long().numpy()
        self.parameters = kernel_parameters(self.plan)
        self.more = [Pointer(x.numpy().astype(np.int64).ravel()) if isinstance(x, torch.Tensor)
                     else x for x in kernels.arguments(tables)]
        source_text = emit_listed(self.plan)
        self.names, self.words = run_text(source_text), "def live_pairs" not in source_text
        join = re.search(r"def mask_tile.*?\n((?:    [^\n]*\n)*?)    ROWS:", source_text, re.DOTALL)
        assert join is not None
        body = join[1][join[1].rindex('"""\n') + 4:] if '"""' in join[1] else join[1]
        parameters = re.search(r"def find_tiles\(p_first, p_last, (.*?)batch, head,", source_text,
                               re.DOTALL)
        assert parameters is not None
        arguments = ", ".join(parameters[1].split(", "))
        body = body.replace(".to(gl.int64)", "")
        exec(f"def join_state(state, {arguments}batch, head):\n{body}    return state\n",
             self.names)
        self.lengths = (shape.q_len, shape.kv_len, shape.q_offset, shape.total_len, *self.more)

    def count(self) -> npt.NDArray[np.int64]:
        """How often each (batch, head, row, key) is kept."""
        c, s = self.config, self.shape
        groups = HEADS // c.heads_packed
        cut = schedule_listed(c, s, groups * BATCH, HEADS // KV_HEADS // c.heads_packed)
        times = np.zeros((BATCH, HEADS, s.q_len, s.kv_len), dtype=np.int64)
        for item in range(cut.items):
            opened = self.names["open_item"](
                item, item, cut.q_tiles, groups * BATCH, groups, cut.section, 0, 0, 1,
                cut.q_tiles * cut.section, 0, cut.section, 0, groups, 0, *self.lengths,
                None, c.heads_packed, c.span, c.narrow, BLOCK_N, GRAIN)
            self.visit(times, *opened)
        return times

    def visit(self, times: npt.NDArray[np.int64], batch: Any, head: Any, q_tile: Any, part: Any,
              narrow: Any, rest: Any, loose: Any, masked_steps: Any, first: Any, last: Any,
              state: Any) -> None:
        here, = state
        letter = tuple(int(load(here + i + 2)) for i in range(len(self.numbers)))
        state = self.names["join_state"](letter, *self.lengths, batch, head)
        assert part == -1 and last > first == 0 and rest * GRAIN <= self.config.narrow
        both = (0, 1)
        for j in range(int(narrow)):
            self.keep(times, batch, head, q_tile, j, narrow, state, both)
        for n in range(int(last)):
            if n < masked_steps:
                for j in range(TILE):
                    self.keep(times, batch, head, q_tile, int(rest + n * TILE + j), loose, state,
                              both)
            else:
                self.keep_full(times, batch, head, q_tile, int((n - masked_steps) * TILE), state)
        if has_sides(self.plan):
            for t in range(int(state[0])):
                for side in both:
                    for j in range(TILE):
                        self.keep(times, batch, head, q_tile, t * TILE + j, 0, state, (side,))

    def rows_of(self, q_tile: Any, groups: tuple[int, ...]) -> npt.NDArray[np.int64]:
        """Rows of the call that some warp groups hold: with one head an item, 64 each."""
        rows = np.arange(q_tile * self.config.span, (q_tile + 1) * self.config.span)
        if len(groups) == 1:
            rows = rows[64 * groups[0]:64 * groups[0] + 64]
        return rows[rows < self.shape.q_len]

    def keep_full(self, times: npt.NDArray[np.int64], batch: Any, head: Any, q_tile: Any,
                  i: int, state: Any) -> None:
        static_full = state[self.numbers.index("static_full")]
        if i < static_full:
            starts = [int(self.names["full_at"](i, state)) * GRAIN + j * GRAIN for j in range(TILE)]
        else:
            starts = [int(self.names["start_of"]((1 << 26) + i - static_full + j, 0, state, GRAIN))
                      for j in range(TILE)]
        for start in starts:
            assert start >= 0 and start + GRAIN <= self.shape.kv_len
            for h in range(self.config.heads_packed):
                times[batch, head + h][np.ix_(self.rows_of(q_tile, (0, 1)),
                                              np.arange(start, start + GRAIN))] += 1

    def keep(self, times: npt.NDArray[np.int64], batch: Any, head: Any, q_tile: Any, i: int,
             count: Any, state: Any, groups: tuple[int, ...]) -> None:
        """Count the pairs that the mask of grain i leaves."""
        side = len(groups) == 1
        start = int(self.names["side_start"](i, state, groups[0] == 1) if side else
                    self.names["start_of"](i, count, state, GRAIN))
        rows = self.rows_of(q_tile, groups)
        if not len(rows):
            return
        p = (rows + self.shape.q_offset)[:, None]
        keys = self.loaded(start, batch, head)
        args = (q_tile, *self.lengths, batch, head, self.config.span)
        if self.words and side:
            word = self.names["side_word"](p[:, 0], np.int64(start), state, *args, GRAIN)
            live = (np.broadcast_to(word, p.shape) >> np.arange(GRAIN)) & 1
        elif self.words:
            word = self.names["live_words"](p[:, 0], np.int64(start), i, state, *args, GRAIN)
            live = (np.broadcast_to(word, p.shape) >> np.arange(GRAIN)) & 1
        else:
            asked = np.where(keys >= 0, keys, start + np.arange(GRAIN))
            asked = self.column_keys(start, i, state, asked)
            kind = 3 if side else self.names["kind_of"](i, state)
            live = np.broadcast_to(self.names["live_pairs"](
                p, asked[None, :], np.array([[kind]]), state, *args), (len(rows), GRAIN))
        there = (keys >= 0) & (keys < self.shape.kv_len)
        assert not live[:, ~there].any(), (i, start)
        for h in range(self.config.heads_packed):
            np.add.at(times[batch, head + h], np.ix_(rows, keys[there]),
                      live[:, there].astype(np.int64))

    def loaded(self, start: int, batch: Any, head: Any) -> npt.NDArray[np.int64]:
        """The keys TMA brings for a grain; -1 where it brings none."""
        place = np.arange(start, start + GRAIN)
        if 1 << 29 <= start < 1 << 30:
            assert self.keys is not None
            copies = self.keys[int(batch), int(head) * self.keys.shape[1] // HEADS]
            place = place - (1 << 29)
            return np.where(place < len(copies), copies[np.minimum(place, len(copies) - 1)], -1)
        return np.where((place >= 0) & (place < self.shape.kv_len), place, -1)

    def column_keys(self, start: int, i: int, state: Any,
                    keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Keys of a grain of columns, as the kernel reads them from the list."""
        if not 1 << 29 <= start < 1 << 30:
            return keys
        names = dict(zip([n.strip() for n in state_line(self.plan).removesuffix(
            " = state").strip(", ").split(",")], state, strict=True))
        limit = eval(column_limit(self.plan), {"tl": NUMPY_NAMES["tl"], "i": i, **names})
        place = start - (1 << 29) + np.arange(GRAIN)
        return np.asarray(load(names["column_list"] + place, place < limit, 1 << 30))


def check(mask: Mask, shape: Shape, data: dict[str, Any]) -> None:
    whole = simplify(mask)
    if refuse_listed(whole) or not slots_of(whole) or not shape.q_len or not shape.kv_len:
        return
    here = {atom.slot: data[atom.slot] for atom in slots_of(whole)}
    times = ListedWalk(whole, shape, here).count()
    asked = {atom.slot: data[atom.slot] for atom in slots_of(mask)}
    live = dense(mask, shape, BATCH, HEADS, "cpu", asked).numpy().astype(np.int64)
    assert np.array_equal(times, live), (mask, shape)


@settings(max_examples=15)
@given(dynamic_masks(), shapes(max_len=260), st.data())
def test_every_live_pair_is_kept_once(mask: Mask, shape: Shape, data: st.DataObject) -> None:
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        check(mask, shape, data.draw(slot_data(mask, shape)))


def draw(seed: int, heads: int, vertical: int, runs: int, length: int, run: int) -> VSIndices:
    """Columns, and slashes in runs; some beyond the end, some twice."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(-9, length + 9, (1, heads, runs), generator=generator)
    slashes = (starts[..., None] + torch.arange(run)).flatten(-2)
    columns = torch.randint(-3, length + 3, (1, heads, vertical), generator=generator)
    return VSIndices(columns.int(), slashes.int())


@pytest.mark.parametrize(("heads", "run", "shape"), [
    (1, 70, Shape(300, 300)), (KV_HEADS, 1, Shape(100, 500, 350, 500)),
    (HEADS, 64, Shape(300, 300))])
@pytest.mark.parametrize("mask", [
    VerticalSlash("vs") & Causal(), (Sink(8) | Window(100) | LastQ(40) | VerticalSlash("vs"))
    & Causal(), VerticalSlash("vs") - Window(70), Columns("c") | VerticalSlash("vs")], ids=repr)
def test_vertical_slash(mask: Mask, heads: int, run: int, shape: Shape) -> None:
    check(mask, shape, {"vs": draw(run, heads, 70, 3, 500, run),
                        "c": ColumnIndices(draw(9, 1, 40, 1, 500, 1).vertical)})


@pytest.mark.parametrize("mask", [
    Blocks("b", 128, 128), (Blocks("b", 128, 128) | Sink(40)) & Causal(),
    (Blocks("b", 128, 128) & Causal()) | Window(64), Blocks("b", 128, 128) - Window(200),
    Blocks("b", 128, 128) | VerticalSlash("vs"), Blocks("b", 128, 128) | Columns("c")], ids=repr)
def test_blocks(mask: Mask) -> None:
    shape = Shape(600, 840)
    live = torch.rand(1, HEADS, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    check(mask, shape, {"b": BlockIndices.from_mask(live, 128, 128),
                        "vs": draw(3, KV_HEADS, 40, 3, 800, 20),
                        "c": ColumnIndices(draw(4, 1, 99, 1, 800, 1).vertical)})


def test_warp_groups_pass_over_what_their_rows_do_not_see() -> None:
    """One run of 64 slashes: each warp group computes two grains for the other's and its own each,
    and two are loaded for both."""
    data = {"vs": VSIndices(torch.zeros(1, HEADS, 0, dtype=torch.int32),
                            torch.arange(256, 320, dtype=torch.int32).expand(1, HEADS, -1))}
    walk = ListedWalk(simplify(VerticalSlash("vs") & Causal()), Shape(1024, 1024), data)
    counts = [walk.numbers.index(f"{which}_total") for which in ("both", "zero", "one")]
    row = walk.more[[p.name for p in walk.parameters].index("union_plan")]
    items = row.numbers.reshape(BATCH, HEADS, 8, -1)[:, :, 3:]  # far enough from key 0
    for place in counts:
        assert (items[..., place + 2] == 2).all()
