"""From pieces to the scalar text that tells, for one key tile, which query tiles see it.

The same spans as in `bounds`, read the other way round. Every term t of a bound never falls as p
grows, so t(p) >= y from some row on; call that row t^-1(y). For the key tile [k_first, k_last]

    hull    lo(p) <= k_last and hi(p) > k_first:  rows [hi^-1(k_first + 1), lo^-1(k_last + 1))
    core    lo(p) <= k_first and hi(p) > k_last:  rows [hi^-1(k_last + 1), lo^-1(k_first + 1))

both within the rows the piece has. A term of which no inverse is known bounds no row: the hull is
then wider than need be, tested pair by pair, and there is no core. Rows become query tiles, and
the tiles are sorted and merged like key tiles: no table.

p + 1 >= y  -->  p >= y - 1;  64 * floor(p / 64) >= y  -->  p >= 64 * ceil(y / 64)

Documents turn round by themselves: the rows that see key k are those of its document. Where
call-time data lists pairs, the static loops walk what is live without any (`lists`), and the query
tiles listed for a key tile lie outside theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sympy

from maskdsl.codegen.bounds import (
    Lines,
    TileRange,
    describe_piece,
    merge_prefixes,
    nest_text,
    split_segments,
)
from maskdsl.codegen.listing import Segment
from maskdsl.codegen.lists import replace_lists
from maskdsl.codegen.plan import Plan, Sieve, Visits, cover_tiles
from maskdsl.codegen.sieve import write_sieve
from maskdsl.shape import Shape
from maskdsl.simplify import simplify
from maskdsl.spans import ZERO, Piece, Terms, spans
from maskdsl.text import NUMPY_NAMES, write_integer
from maskdsl.tiles import names_of
from maskdsl.trace import KV_LEN, Lookup, P

K_FIRST, K_LAST = sympy.symbols("k_first k_last", integer=True, nonnegative=True)
Q_OFFSET, Q_END = sympy.symbols("q_offset q_end", integer=True)
SETUP = ("q_end = q_offset + q_len", "row_tiles = tl.cdiv(q_len, BLOCK_M)")


@dataclass(frozen=True, slots=True)
class KeyPlan:
    """How a kernel walks a mask by key tile; segments are of query tiles.

    plan          the plan of the same mask and tile by query tile: its tests serve both
    bounds        scalar text: from k_first, k_last and the lengths to the segments' ends
    full, masked  the segments of the two loops
    sieve         dead-tile test of the masked loop, where one pays; all of it runs once a tile,
                  and `tile` is the query tile
    hulls         the query tiles of the two loops together, in order
    reach         lines for `first` and `stop`, and for the cores: the query tiles that lists may
                  hold
    first, stop   names of its ends
    cores         query tiles that are live throughout where the (only) table lists them
    """

    plan: Plan
    bounds: tuple[str, ...]
    full: tuple[Segment, ...]
    masked: tuple[Segment, ...]
    sieve: Sieve | None
    hulls: tuple[Segment, ...] = ()
    reach: tuple[str, ...] = ()
    first: str = "0"
    stop: str = "0"
    cores: tuple[Segment, ...] = ()

    def run_bounds(self, shape: Shape, batch: int = 0, head: int = 0,
                   bound: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The variables of the bounds text, each int or int64[key tiles]."""
        first = np.arange(0, shape.kv_len, self.plan.block_n, dtype=np.int64)
        values: dict[str, Any] = {
            **NUMPY_NAMES, **names_of(shape, batch, head, self.plan.mask, bound),
            "BLOCK_M": self.plan.block_m, "BLOCK_N": self.plan.block_n,
            "q_offset": shape.q_offset, "k_first": first,
            "k_last": np.minimum(first + self.plan.block_n, shape.kv_len) - 1}
        exec("\n".join((*self.bounds, *self.reach)), values)
        return values

    def visit(self, shape: Shape, batch: int = 0, head: int = 0,
              bound: Mapping[str, Any] | None = None) -> Visits:
        """Which tiles the two loops visit, bool[query tiles, key tiles]."""
        values = self.run_bounds(shape, batch, head, bound)
        rows = np.arange(-(-shape.q_len // self.plan.block_m))
        like = values["k_first"]
        counts = []
        for which in (self.full, self.masked):
            ends = [(np.broadcast_to(eval(s.start, values), like.shape),
                     np.broadcast_to(eval(s.stop, values), like.shape)) for s in which]
            counts.append(cover_tiles(ends, rows, like.size).T)
        full, masked = counts[0] > 0, counts[1] > 0
        if self.sieve is not None and rows.size and like.size:
            masked &= self._sift(values, rows)
        return Visits(full, masked)

    def _sift(self, values: dict[str, Any], rows: np.ndarray[Any, Any]) -> Any:
        """The sieve on every (query tile, key tile), bool."""
        assert self.sieve is not None
        first = values["q_offset"] + rows * self.plan.block_m
        last = np.minimum(first + self.plan.block_m, values["q_end"]) - 1
        table = values | {"tile": rows[:, None], "p_first": first[:, None],
                          "p_last": last[:, None], "start": values["k_first"],
                          "stop": values["k_last"]}
        exec("\n".join((*self.sieve.setup, *self.sieve.lines)), table)
        return np.asarray(eval(self.sieve.test, table), dtype=bool)


def make_key_plan(plan: Plan) -> KeyPlan:
    """The plan by key tile of a plan by query tile."""
    lines = Lines()
    for line in SETUP:
        lines.add(line)
    base, sure = plan.pieces, plan.pieces
    if plan.lists.listed:
        sure = spans(simplify(replace_lists(plan.mask, False, True)))
    block = plan.block_n if base == sure else 0
    ranges = [bound_rows(lines, i, piece, block) for i, piece in enumerate(base)]
    if base != sure:
        ranges += [bound_rows(lines, len(base) + i, piece, plan.block_n)
                   for i, piece in enumerate(sure)]
    full, masked, hulls = split_segments(lines, merge_prefixes(lines, ranges))
    if plan.lists.listed:
        return bound_lists(KeyPlan(plan, tuple(lines.text), full, masked, None, hulls),
                           len(ranges))
    sieve = write_sieve(plan.pieces, ranges) if plan.sieve else None
    return KeyPlan(plan, tuple(lines.text), full, masked, sieve, hulls)


def bound_lists(made: KeyPlan, count: int) -> KeyPlan:
    """The plan with the query tiles that lists may hold; `count` pieces have names already."""
    plan, lines = made.plan, Lines()
    lines.add("# query tiles that lists may hold")
    pieces = spans(simplify(replace_lists(plan.mask, True, False)))
    ranges = [bound_rows(lines, count + i, piece, 0) for i, piece in enumerate(pieces)]
    if not ranges:
        return made
    first = lines.set("reach_first", nest_text("tl.minimum", [r.start for r in ranges]))
    stop = lines.set("reach_stop", f"tl.minimum({nest_text('tl.maximum', [r.stop for r in ranges])}"
                                   ", row_tiles)")
    inside: tuple[Piece, ...] = ()
    if len(plan.lists.tables) == 1:
        lines.add("# those that are live throughout where they are listed")
        inside = spans(simplify(replace_lists(plan.mask, False, True, plan.lists.tables[0])))
    cores = [bound_rows(lines, count + len(pieces) + i, piece, plan.block_n)
             for i, piece in enumerate(inside)]
    return replace(made, reach=tuple(lines.text), first=first, stop=stop, cores=tuple(
        Segment(r.core_start, r.core_stop) for r in cores if r.core_start != r.core_stop))


def bound_rows(lines: Lines, i: int, piece: Piece, block_n: int) -> TileRange:
    """The query tiles of one piece's hull and core, as text; no core where block_n is 0."""
    lines.add(f"# {describe_piece(piece)}")
    low, high, some = row_range(piece, K_FIRST + 1, K_LAST + 1)
    start = "0"
    rows_lo = lines.set(f"rows_lo{i}", write_integer(low))
    rows_hi = lines.set(f"rows_hi{i}", write_integer(high))
    if low != Q_OFFSET:
        start = lines.set(f"start{i}", f"({rows_lo} - q_offset) // BLOCK_M")
    alive = " & ".join([f"({rows_hi} > {rows_lo})", *some])
    stop = "row_tiles"
    if low != Q_OFFSET or high != Q_END or some:
        stop = lines.set(f"stop{i}", f"tl.where({alive}, tl.cdiv({rows_hi} - q_offset, BLOCK_M), "
                         f"{start})")
    if not block_n or not piece.fills(block_n) or not all(map(is_invertible, piece.lo + piece.hi)):
        return TileRange(start, stop, start, start)
    low, high, every = row_range(piece, K_LAST + 1, K_FIRST + 1)
    return TileRange(start, stop, *bound_core(lines, i, (low, high), every))


def bound_core(lines: Lines, i: int, rows: tuple[sympy.Expr, sympy.Expr],
               every: list[str]) -> tuple[str, str]:
    """The tiles wholly within some rows; a tile cut off by the last row of the call is whole."""
    low, high = rows
    start = "0"
    if low != Q_OFFSET:
        core_lo = lines.set(f"core_lo{i}", write_integer(low))
        start = lines.set(f"core_start{i}", f"tl.cdiv({core_lo} - q_offset, BLOCK_M)")
    stop = "row_tiles"
    if high != Q_END:
        core_hi = lines.set(f"core_hi{i}", write_integer(high))
        stop = (f"tl.where({core_hi} < q_end, tl.maximum({core_hi} - q_offset, 0) // BLOCK_M, "
                "row_tiles)")
    if every:
        stop = f"tl.where({' & '.join(every)}, {stop}, 0)"
    if start != "0":
        stop = f"tl.maximum({stop}, {start})"
    return start, lines.set(f"core_stop{i}", stop)


def row_range(piece: Piece, above: sympy.Expr,
              below: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr, list[str]]:
    """(first row, last row + 1, tests that no row decides) of hi(p) >= above, lo(p) < below.

    Rows without a key of the tile lie outside; those within may still have none, where a term has
    no known inverse.
    """
    low = [Q_OFFSET, *piece.first, *inverses(piece.hi, above)]
    high = [Q_END, *piece.last, *inverses(piece.lo, below)]
    tests = [f"({write_integer(t)} >= {write_integer(above)})" for t in piece.hi
             if not t.has(P) and t != KV_LEN]
    tests += [f"({write_integer(t)} < {write_integer(below)})" for t in piece.lo
              if not t.has(P) and t != ZERO]
    return sympy.Max(*low), sympy.Min(*high), tests


def inverses(terms: Terms, value: sympy.Expr) -> Iterable[sympy.Expr]:
    """t^-1(value) of all terms with p that have a known one."""
    found = (first_row(t, value) for t in terms if t.has(P))
    return [row for row in found if row is not None]


def is_invertible(term: sympy.Expr) -> bool:
    """Whether the rows a term allows are known exactly."""
    return not term.has(P) or first_row(term, K_FIRST) is not None


def first_row(term: sympy.Expr, value: sympy.Expr) -> sympy.Expr | None:
    """The first row p with term(p) >= value; None where no formula is known.

    c + n * p, c + n * floor((a * p + b) / m), start or stop of the document of p
    """
    moving = [t for t in sympy.Add.make_args(sympy.expand(term)) if t.has(P)]
    if len(moving) != 1:
        return None
    scale, core = moving[0].as_coeff_Mul()
    if not scale.is_Integer or scale <= 0:
        return None
    steps = round_up(value - sympy.expand(term - moving[0]), scale)
    if core == P:
        return steps
    if core.func == Lookup and scale == 1 and core.args[1] == P:
        return first_document_row(core.args[0], sympy.expand(steps))
    if core.func != sympy.floor:
        return None
    over, under = sympy.fraction(sympy.together(core.args[0]))
    slope = sympy.expand(over).coeff(P, 1)
    rest = sympy.expand(over - slope * P)
    if not (slope.is_Integer and slope > 0 and under.is_Integer and under > 0) or rest.has(P):
        return None
    return round_up(sympy.expand(under * steps - rest), slope)


def first_document_row(table: sympy.Symbol, value: sympy.Expr) -> sympy.Expr:
    """The first row p with table[p] >= value > 0, of a table of documents' starts or stops.

    With y = value - 1 in a document: start[p] > y from its stop on, stop[p] > y from its start on.
    Padding is an empty document, start[y] = stop[y] = y: there it is y + 1 for both.
    """
    slot, which = str(table).rsplit("_", 1)
    start, stop = (Lookup(sympy.Symbol(f"{slot}_{name}", **table.assumptions0), value - 1)
                   for name in ("start", "stop"))
    if which == "start":
        return sympy.Max(stop, value)
    inside = sympy.Min(sympy.expand(stop - value + 1), 1)  # 0 for padding
    return value - inside * sympy.expand(value - start)


def round_up(e: sympy.Expr, by: sympy.Expr) -> sympy.Expr:
    """ceil(e / by), as the text can say it: -floor(-e / by)."""
    return sympy.expand(e) if by == 1 else -sympy.floor(sympy.expand(-e) / by)
