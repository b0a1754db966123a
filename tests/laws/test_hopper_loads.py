"""Where the Hopper kernel's loads put queries, keys and values in shared memory.

The loading functions of the emitted file are run as Python with a TMA that writes into a flat
memory as the hardware does: a box of up to 64 elements a row is stored row after row, wider boxes
64 columns at a time. (The swizzle permutes bytes within atoms of 8 rows, which all boxes and tiles
here are whole numbers of.) What `tile_of` would read as a matrix must hold the right elements.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from maskdsl import Causal, Mask, Window, simplify
from maskdsl.codegen.emit_hopper import emit_hopper
from maskdsl.codegen.hopper import blocks_of
from maskdsl.codegen.hopper_cut import (
    GRAIN,
    make_plans,
    parts_of,
    pick_hopper,
    pick_room,
    room_config,
    value_parts,
)
from maskdsl.tiles import Ints

FUNCTIONS = ("query_place", "query_phase", "load_queries", "load_loose", "load_full")
STARTS = (0, 96, 512, 32)  # of loose grains
FAR = 1 << 20
DIMS = [(64, 64), (96, 96), (128, 128), (128, 96), (192, 128), (192, 192), (256, 256), (96, 40)]


def chunks(rows: int, width: int) -> Ints:
    """Where a matrix keeps its elements: int64[rows, width] offsets."""
    r, c = np.arange(rows)[:, None], np.arange(width)[None]
    wide = min(width, 64)
    return c // wide * (rows * wide) + r * wide + c % wide


class Ring:
    """Shared memory cut into pieces of `size` elements."""

    def __init__(self, memory: Ints, size: int, width: int) -> None:
        self.memory, self.size, self.shape = memory, size, (0, 1, 1, 0, width)

    def index(self, i: int) -> Ints:
        assert 0 <= i < len(self.memory) // self.size
        return self.memory[i * self.size:(i + 1) * self.size]


class Descriptor:
    """A descriptor of a tensor whose element (head, row, column) is a number that tells all."""

    def __init__(self, block: tuple[int, ...]) -> None:
        self.block_type = SimpleNamespace(shape=list(block), nbytes=2 * int(np.prod(block)))

    def copy(self, coordinates: list[int], place: Ints) -> None:
        """One TMA copy of a box."""
        _, heads, rows, width = self.block_type.shape
        _, head, row, column = coordinates
        h, r = np.divmod(np.arange(heads * rows), rows)
        values = number(head + h, row + r)[:, None] + column + np.arange(width)
        assert place.size == values.size
        place[chunks(heads * rows, width)] = values


def number(head: Any, row: Any) -> Any:
    """What element 0 of a row holds."""
    return (head * (FAR + 4096) + row) * 1024


def functions(barrier: Any, computing: int = 2) -> dict[str, Any]:
    """The loading functions of a file; so many warp groups compute."""
    (plan,) = make_plans(simplify(Causal() & Window(99)), 32, 4)
    source = emit_hopper(plan)
    text = "\n\n".join(re.findall(rf"def (?:{'|'.join(FUNCTIONS)})\(.*?(?=\n\n\n)", source,
                                  re.DOTALL))
    waits: Any = SimpleNamespace(wait=lambda *_: None, expect=barrier.expect)
    names: dict[str, Any] = {
        "gl": SimpleNamespace(static_range=range, constexpr=int), "mbarrier": waits,
        "COMPUTING": computing,
        "claim": lambda *_: None,
        "start_of": lambda i, count, state, grain: STARTS[i] if i < count else FAR,
        "tma": SimpleNamespace(async_copy_global_to_shared=barrier.copy)}
    exec(text, names)
    return names


class Barrier:
    """Counts the bytes that are announced and those that come."""

    def __init__(self) -> None:
        self.announced = self.came = 0

    def index(self, _: int) -> Barrier:
        return self

    def expect(self, _: Barrier, count: int) -> None:
        self.announced += count

    def copy(self, desc: Descriptor, coordinates: list[int], _: Barrier, place: Ints) -> None:
        self.came += desc.block_type.nbytes
        desc.copy(coordinates, place)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("dim", "value_dim"), DIMS)
def test_tiles_hold_their_keys(dim: int, value_dim: int, padded: bool) -> None:
    """Whole tiles, tiles of scattered grains, and narrow ones, of keys and of values."""
    config = pick_hopper(simplify(Causal() & Window(99)), 4, dim, value_dim)
    config = room_config(config, *pick_room(dim, value_dim, padded), padded)
    blocks = blocks_of(config, dim, value_dim)
    n, slots, bar = config.block_n, 2, Barrier()
    load = functions(bar)
    for which, (parts, width) in enumerate((parts_of(dim, padded),
                                            value_parts(dim, value_dim, padded))):
        tile, grain = Descriptor(blocks[1 + which]), Descriptor(blocks[3 + which])
        narrow = grain.block_type.shape[3]
        memory = np.full(slots * parts * n * width, -1, dtype=np.int64)
        ring, grains = Ring(memory, n * width, width), Ring(memory, GRAIN * narrow, narrow)
        for rows in sorted({32, 64, n}):
            for full in (True, False) if rows == n else (False,):
                memory[:] = -1
                bar.announced = bar.came = 0
                if full:
                    load["load_full"](tile, bar, 0, ring, 1, 0, 7, 640, parts)
                    keys = 640 + np.arange(n)
                else:
                    count = rows // GRAIN - (rows > GRAIN)  # the last grain is not there
                    load["load_loose"](grain, bar, 0, grains, 1, 0, 7, 0, count, None, rows,
                                       GRAIN, n, parts, width // narrow)
                    starts = [STARTS[j] if j < count else FAR for j in range(rows // GRAIN)]
                    keys = (np.array(starts)[:, None] + np.arange(GRAIN)).ravel()
                assert bar.announced == bar.came == 2 * rows * parts * width
                for part in range(parts):
                    found = ring.index(parts + part)[chunks(rows, width)]  # as tile_of reads it
                    wanted = number(7, keys)[:, None] + part * width + np.arange(width)
                    assert np.array_equal(found, wanted), (rows, full, part)
                assert (memory[:parts * n * width] == -1).all()  # the other slot


@pytest.mark.parametrize("group", [4, 2, 1])
@pytest.mark.parametrize(("mask", "dim", "value_dim"), [
    *((Causal() & Window(99), *dims) for dims in DIMS), (Causal(), 64, 64)], ids=repr)
def test_queries_and_output_share_their_place(mask: Mask, dim: int, value_dim: int,
                                              group: int) -> None:
    config = pick_hopper(simplify(mask), group, dim, value_dim)
    assert config.computing == (3 if mask == Causal() else 2)
    (parts, width), (many, narrow) = (parts_of(dim, config.padded),
                                      value_parts(dim, value_dim, config.padded))
    bar, heads = Barrier(), config.heads_packed
    load = functions(bar, config.computing)
    memory = np.full(config.letters * config.rows * parts * width, -1, dtype=np.int64)
    ring = Ring(memory, 64 * width, width)
    for count in range(3):
        memory[:] = -1
        bar.announced = bar.came = 0
        queries = Descriptor(blocks_of(config, dim, value_dim)[0])
        load["load_queries"](queries, bar, bar, ring, count,
                             0, 8, 320, heads, parts, config.letters)
        assert bar.announced == bar.came == 2 * config.rows * parts * width
        for group_of_warps in range(config.computing):
            row, span = np.arange(64), 64 // heads  # positions of all heads
            head, position = 8 + row // span, 320 + span * group_of_warps + row % span
            place = load["query_place"](count, group_of_warps, config.letters)
            for part in range(parts):
                found = ring.index(place * parts + part)[chunks(64, width)]
                wanted = number(head, position)[:, None] + part * width + np.arange(width)
                assert np.array_equal(found, wanted)
            if config.letters == 2:  # the output takes the very place
                outputs = parts * width // narrow
                first = place * outputs * 64 * narrow
                assert many <= outputs and first == place * parts * 64 * width
