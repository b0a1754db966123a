"""What the compiler knows about one mask at one tile size: a `Plan`.

A plan holds program text, not numbers: the text is pasted into the kernel, and the same text runs
here on numpy arrays (`Plan.visit`), so the host counts and tests exactly what the GPU will do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import numpy.typing as npt

from maskdsl.codegen.listing import NO_LISTS, ListedTest, Lists, Segment
from maskdsl.expr import Mask, operands
from maskdsl.scores import ScoreMod
from maskdsl.shape import Shape
from maskdsl.spans import Piece
from maskdsl.text import NUMPY_NAMES
from maskdsl.tiles import Ints, names_of


@dataclass(frozen=True, slots=True)
class Sieve:
    """Text that tells, for one key tile, whether it may hold a live pair."""

    setup: tuple[str, ...]  # once per query tile
    lines: tuple[str, ...]  # once per key tile; uses tile, start (first key), stop (last key)
    test: str


@dataclass(frozen=True, slots=True)
class Visits:
    """The key tiles one head visits, for every query tile in order.

    full, masked  bool[query tiles, key tiles]
    """

    full: npt.NDArray[np.bool_]
    masked: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a kernel walks a mask; tile sizes in tokens.

    bounds        scalar text: from p_first, p_last and the lengths to the segments' ends
    full, masked  the segments of the two loops, in key tiles
    rows, tests   text of the mask of one tile: row bounds, then conditions on p and k, any of
                  which makes a pair live
    listed_tests  those of the tests that ask call-time lists
    only_adds     whether lists only add pairs, and take none away
    sieve         dead-tile test of the masked loop, where one pays
    last_first    whether the last query tiles are the heaviest and start first
    lists         what call-time data adds to the two loops
    scores        what is done to the scores of live pairs
    borders       where told apart, how many of the masked segments hold borders; every pair in the
                  others is live
    """

    mask: Mask
    block_m: int
    block_n: int
    pieces: tuple[Piece, ...]
    bounds: tuple[str, ...]
    full: tuple[Segment, ...]
    masked: tuple[Segment, ...]
    rows: tuple[str, ...]
    tests: tuple[str, ...]
    listed_tests: tuple[ListedTest, ...]
    only_adds: bool
    sieve: Sieve | None
    last_first: bool
    needs_head: bool
    lists: Lists = NO_LISTS
    scores: tuple[ScoreMod, ...] = ()
    borders: int | None = None

    @property
    def live(self) -> str:
        """The whole mask of a tile as one expression."""
        return " | ".join(self.tests)

    @property
    def graph(self) -> nx.DiGraph:
        """Expression nodes -> pieces -> loops -> kernel, as a networkx DAG."""
        graph = nx.DiGraph(mask=repr(self.mask))
        for atom in self.lists.atoms:
            graph.add_edge(repr(atom), "MASKED loop")
        for node in self.mask.walk():
            graph.add_node(repr(node), kind="expression")
            graph.add_edges_from((repr(child), repr(node)) for child in operands(node))
        for i, piece in enumerate(self.pieces):
            name = f"piece {i}"
            graph.add_node(name, kind="piece", lo=piece.lo, hi=piece.hi, exact=piece.is_exact)
            graph.add_edge(repr(self.mask), name)
            graph.add_edge(name, "MASKED loop")
            if piece.fills(self.block_n):
                graph.add_edge(name, "FULL loop")
        graph.add_node("kernel", kind="kernel")
        for loop in ("FULL loop", "MASKED loop"):
            if loop in graph:
                graph.nodes[loop]["kind"] = "loop"
                graph.add_edge(loop, "kernel")
        if not self.pieces:
            graph.add_edge(repr(self.mask), "kernel")
        return graph

    def run_bounds(self, shape: Shape, batch: int = 0, head: int = 0,
                   bound: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The variables of the bounds text, each int or int64[query tiles]."""
        row = np.arange(0, max(shape.q_len, 1), self.block_m, dtype=np.int64)
        if shape.q_len == 0:
            row = row[:0]
        last = np.minimum(row + self.block_m, shape.q_len) - 1
        values: dict[str, Any] = {
            **NUMPY_NAMES, **names_of(shape, batch, head, self.mask, bound),
            "BLOCK_N": self.block_n, "p_first": row + shape.q_offset,
            "p_last": last + shape.q_offset}
        exec("\n".join(self.bounds), values)
        return values

    def segments(self, which: tuple[Segment, ...],
                 values: dict[str, Any]) -> list[tuple[Ints, Ints]]:
        """(start, stop) of each segment for every query tile."""
        like = values["p_first"]
        return [(np.broadcast_to(eval(s.start, values), like.shape),
                 np.broadcast_to(eval(s.stop, values), like.shape)) for s in which]

    def visit(self, shape: Shape, batch: int = 0, head: int = 0) -> Visits:
        """Which tiles the two loops visit; memory grows with query tiles x key tiles."""
        values = self.run_bounds(shape, batch, head)
        tiles = np.arange(-(-shape.kv_len // self.block_n))
        full = cover_tiles(self.segments(self.full, values), tiles, len(values["p_first"]))
        masked = cover_tiles(self.segments(self.masked, values), tiles, len(values["p_first"]))
        if self.sieve is not None and tiles.size:
            masked &= self.sift(values, tiles)
        return Visits(full > 0, masked > 0)

    def sift(self, values: dict[str, Any], tiles: Ints) -> npt.NDArray[np.bool_]:
        """The sieve on every (query tile, key tile), bool."""
        assert self.sieve is not None
        table = {name: value[:, None] if np.ndim(value) == 1 and not name.startswith("slot_")
                 else value for name, value in values.items()}  # not what positions look up in
        exec("\n".join(self.sieve.setup), table)
        start = tiles * self.block_n
        table |= {"tile": tiles, "start": start,
                  "stop": np.minimum(start + self.block_n, values["kv_len"]) - 1}
        exec("\n".join(self.sieve.lines), table)
        return np.asarray(eval(self.sieve.test, table), dtype=bool)

    def count_tiles(self, shape: Shape, batch: int = 0, head: int = 0) -> tuple[int, int]:
        """(full, masked) key tiles visited by one head; memory in tiles squared only if sieved."""
        if self.sieve is not None:
            visits = self.visit(shape, batch, head)
            return int(visits.full.sum()), int(visits.masked.sum())
        values = self.run_bounds(shape, batch, head)
        full, masked = (sum(int((b - a).sum()) for a, b in self.segments(which, values))
                        for which in (self.full, self.masked))
        return full, masked


def cover_tiles(segments: list[tuple[Ints, Ints]], tiles: Ints, rows: int) -> Ints:
    """How often the segments cover each tile, int64[rows, tiles]; once, if the plan is right."""
    times = np.zeros((rows, tiles.size), dtype=np.int64)
    for start, stop in segments:
        times += (tiles >= start[:, None]) & (tiles < stop[:, None])
    return times
