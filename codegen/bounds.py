"""From pieces to the scalar text that tells a kernel which key tiles to visit.

For the query tile [p_first, p_last] a piece's *hull* is [min lo, max hi) and its *core*
[max lo, min hi). Bounds are monotone in p, so both are read off at the two ends. Tiles of the
core are FULL, tiles of the hull that are in no core are MASKED, and every tile is visited once:

    sorted starts and sorted ends of overlapping intervals cover each tile as often as the
    intervals did; clipping each start to the previous end leaves their disjoint union. The
    MASKED tiles are the union of hulls minus the union of cores, where every end of a core opens
    a stretch and every start of a core closes one.

Sorting is a few scalar min/max: no table, no memory, nothing to rebuild for another length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import sympy

from maskdsl.codegen.listing import Segment
from maskdsl.spans import Piece, Terms
from maskdsl.text import write_integer
from maskdsl.trace import P

P_FIRST, P_LAST, ROWS_FIRST, ROWS_LAST = sympy.symbols(
    "p_first p_last rows_first rows_last", integer=True)


@dataclass(slots=True)
class Lines:
    """Text under construction, with a counter for fresh names."""

    text: list[str] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)
    fresh: int = 0

    def add(self, line: str) -> None:
        self.text.append(line)

    def set(self, name: str, value: str) -> str:
        """Assign `value` to `name`; numbers, names and values that have a name need no line."""
        if value.isdigit() or value.isidentifier():
            return value
        if value not in self.known:
            self.add(f"{name} = {value}")
            self.known[value] = name
        return self.known[value]


@dataclass(frozen=True, slots=True)
class TileRange:
    """Hull and core of a piece, or of pieces that start at the same tile, in key tiles."""

    start: str
    stop: str
    core_start: str
    core_stop: str  # equal to core_start where there is no core


def at(terms: Terms, where: sympy.Expr, extreme: type[sympy.Max] | type[sympy.Min]) -> sympy.Expr:
    """max or min of the terms at one position, simplified."""
    return extreme(*(t.xreplace({P: where}) for t in terms))


@dataclass(frozen=True, slots=True)
class Bounds:
    """Everything `bound_pieces` found out.

    lines   the text
    ranges  the tile range of each piece
    full    the disjoint union of the cores; masked: that of the hulls without it
    hulls   the disjoint union of the hulls: all tiles the two loops visit
    borders where told apart, how many of the masked segments hold tiles outside the cores; the
            others hold what whole multiples leave of them
    """

    lines: Lines
    ranges: list[TileRange]
    full: tuple[Segment, ...]
    masked: tuple[Segment, ...]
    hulls: tuple[Segment, ...]
    borders: int | None = None


def bound_pieces(pieces: tuple[Piece, ...], block_n: int, sure: tuple[Piece, ...] | None = None,
                 multiple: int = 1, apart: bool = False) -> Bounds:
    """Pieces -> bounds text, the tile range of each, full and masked segments.

    sure      the pieces whose cores are live whatever call-time data says, where that is not
              `pieces`
    multiple  full segments are whole multiples of this many tiles; what is over is masked,
    apart     in segments of its own
    """
    lines = Lines()
    if sure is None:
        ranges = [bound_piece(lines, i, piece, block_n) for i, piece in enumerate(pieces)]
    else:
        ranges = [bound_piece(lines, i, piece, 0) for i, piece in enumerate(pieces)]
        ranges += [bound_piece(lines, len(pieces) + i, piece, block_n)
                   for i, piece in enumerate(sure)]
    merged = merge_prefixes(lines, ranges)
    if apart and multiple > 1:
        return part_segments(lines, ranges, merged, multiple)
    full, masked, hulls = split_segments(lines, merged, multiple)
    return Bounds(lines, ranges, full, masked, hulls)


def part_segments(lines: Lines, ranges: list[TileRange], merged: list[TileRange],
                  multiple: int) -> Bounds:
    """Bounds whose masked segments hold either borders, or what is over of full stretches."""
    whole, borders, hulls = split_segments(lines, merged)
    full = tuple(round_segment(lines, i, s, multiple) for i, s in enumerate(whole))
    over = tuple(Segment(a.start, b.start) for a, b in zip(whole, full, strict=True))
    return Bounds(lines, ranges, full, borders + over, hulls, len(borders))


def bound_reach(lines: Lines, first: int, pieces: tuple[Piece, ...]) -> tuple[str, str]:
    """The keys from the first to the last one any piece may hold for the query tile, as text.

    first  the number of the first piece, for names
    """
    hulls = [bound_hull(lines, first + i, piece)[:2] for i, piece in enumerate(pieces)]
    if not hulls:
        return "0", "0"
    lo = lines.set("reach_lo", nest_text("tl.minimum", [lo for lo, _ in hulls]))
    return lo, lines.set("reach_hi", nest_text("tl.maximum", [hi for _, hi in hulls]))


def bound_piece(lines: Lines, i: int, piece: Piece, block_n: int) -> TileRange:
    """The hull and core of one piece, as text.

    [max(0, p - 2047), min(p + 1, kv_len))  -->  hull from p_first to p_last, core from p_last to
    p_first

    block_n  keys a tile; 0 for no core
    """
    lo, hi, whole = bound_hull(lines, i, piece)
    start = "0" if lo == "0" else lines.set(f"start{i}", f"{lo} // BLOCK_N")
    stop = f"tl.cdiv(tl.maximum({hi}, 0), BLOCK_N)"
    if lo != "0":
        stop = f"tl.where({hi} > {lo}, tl.cdiv({hi}, BLOCK_N), {start})"
    stop = lines.set(f"stop{i}", stop)
    if not block_n or not piece.fills(block_n):
        return TileRange(start, stop, start, start)
    core_lo = lines.set(f"core_lo{i}", write_integer(at(piece.lo, P_LAST, sympy.Max)))
    core_hi = lines.set(f"core_hi{i}", write_integer(at(piece.hi, P_FIRST, sympy.Min)))
    if whole:
        core_hi = lines.set(f"whole_hi{i}", f"tl.where({whole}, {core_hi}, 0)")
    core_start = core_lo if core_lo == "0" else \
        lines.set(f"core_start{i}", f"tl.cdiv({core_lo}, BLOCK_N)")
    core_stop = lines.set(f"core_stop{i}", f"tl.maximum({core_hi} // BLOCK_N, {core_start})")
    return TileRange(start, stop, core_start, core_stop)


def bound_hull(lines: Lines, i: int, piece: Piece) -> tuple[str, str, str]:
    """(first key, last key + 1, test that all rows have the piece) of one piece's hull."""
    lines.add(f"# {describe_piece(piece)}")
    first, last, alive, whole = _bound_rows(lines, i, piece)
    lo = lines.set(f"lo{i}", write_integer(at(piece.lo, first, sympy.Max), _names(i)))
    hi = lines.set(f"hi{i}", write_integer(at(piece.hi, last, sympy.Min), _names(i)))
    if alive:
        hi = lines.set(f"live_hi{i}", f"tl.where({alive}, {hi}, 0)")
    return lo, hi, whole


def _names(i: int) -> dict[sympy.Expr, str]:
    return {ROWS_FIRST: f"rows_first{i}", ROWS_LAST: f"rows_last{i}"}


def _bound_rows(lines: Lines, i: int, piece: Piece) -> tuple[sympy.Expr, sympy.Expr, str, str]:
    """Rows of the tile the piece has: first and last, the test for any, the test for all."""
    first, last, alive, whole = P_FIRST, P_LAST, "", []
    if piece.first:
        bound = write_integer(sympy.Max(*piece.first))
        lines.add(f"rows_first{i} = tl.maximum(p_first, {bound})")
        first = ROWS_FIRST
        whole.append(f"(p_first >= {bound})")
    if piece.last:
        bound = write_integer(sympy.Min(*piece.last))
        lines.add(f"rows_last{i} = tl.minimum(p_last, {bound} - 1)")
        last = ROWS_LAST
        whole.append(f"(p_last < {bound})")
    if whole:
        alive = f"{write_integer(first, _names(i))} <= {write_integer(last, _names(i))}"
    return first, last, alive, " & ".join(whole)


def describe_piece(piece: Piece) -> str:
    """One comment line: where the piece comes from and which keys it holds."""
    lo = write_integer(sympy.Max(*piece.lo))
    hi = write_integer(sympy.Min(*piece.hi))
    text = f"{' & '.join(piece.origin) or 'Full()'}: keys [{lo}, {hi})"
    if piece.first:
        text += f", rows p >= {write_integer(sympy.Max(*piece.first))}"
    if piece.last:
        text += f", rows p < {write_integer(sympy.Min(*piece.last))}"
    text = re.sub(r"floor_div\((\w+), (\w+)\)", r"(\1 // \2)", text)
    text = text.replace("tl.minimum", "min").replace("tl.maximum", "max")
    return text if piece.is_exact else f"{text}, tested pair by pair"


def merge_prefixes(lines: Lines, ranges: list[TileRange]) -> list[TileRange]:
    """Ranges that start at tile 0 as one: [0, a), [0, b)  -->  [0, max(a, b))."""
    prefixes = [r for r in ranges if r.start == "0"]
    if len(prefixes) < 2:
        return sorted(ranges, key=lambda r: r.start != "0")
    lines.add("# all that starts at key 0, as one range")
    stop = lines.set("prefix_stop", nest_text("tl.maximum", [r.stop for r in prefixes]))
    cores = [r.core_stop for r in prefixes if r.core_stop != "0" and r.core_start == "0"]
    core = lines.set("prefix_core", nest_text("tl.maximum", cores)) if cores else "0"
    rest = [r for r in ranges if r.start != "0"]
    return [TileRange("0", stop, "0", core), *rest]


def nest_text(name: str, args: list[str]) -> str:
    """f(a, f(b, c)) of two or more arguments, of one the argument."""
    text = args[-1]
    for arg in reversed(args[:-1]):
        text = f"{name}({arg}, {text})"
    return text


def split_segments(lines: Lines, ranges: list[TileRange], multiple: int = 1) -> tuple[
        tuple[Segment, ...], tuple[Segment, ...], tuple[Segment, ...]]:
    """Overlapping ranges -> disjoint full and masked segments (the argument is at the top), and the
    two together."""
    if not ranges:
        return (), (), ()
    cores = [r for r in ranges if r.core_start != r.core_stop]
    if len(cores) > 1:
        lines.add("# FULL: the union of the cores, each tile once")
    full = unite_ranges(lines, [r.core_start for r in cores], [r.core_stop for r in cores])
    if multiple > 1:
        full = tuple(round_segment(lines, i, s, multiple) for i, s in enumerate(full))
    lines.add("# MASKED: the union of the hulls without the cores, each tile once")
    hulls = unite_ranges(lines, [r.start for r in ranges], [r.stop for r in ranges])
    opens = [s.start for s in hulls] + [s.stop for s in full]
    closes = [s.stop for s in hulls] + [s.start for s in full]
    for name in [n for n in opens if n in closes]:
        if name in closes:
            opens.remove(name)
            closes.remove(name)
    opens, closes = sort_names(lines, opens), sort_names(lines, closes)
    return full, tuple(map(Segment, opens, closes)), hulls


def round_segment(lines: Lines, i: int, segment: Segment, multiple: int) -> Segment:
    """The end of a segment that is a whole multiple of `multiple` tiles.

    [0, 7) in multiples of 4  -->  [3, 7)
    """
    width = segment.stop if segment.start == "0" else f"({segment.stop} - {segment.start})"
    start = lines.set(f"whole{i}", f"{segment.stop} - {width} // {multiple} * {multiple}")
    return Segment(start, segment.stop)


def unite_ranges(lines: Lines, starts: list[str], stops: list[str]) -> tuple[Segment, ...]:
    """The disjoint union of ranges, in order."""
    starts, stops = sort_names(lines, starts), sort_names(lines, stops)
    result = []
    for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        clipped = start
        if i > 0:
            lines.fresh += 1
            clipped = lines.set(f"from{lines.fresh}", f"tl.maximum({start}, {stops[i - 1]})")
        result.append(Segment(clipped, stop))
    return tuple(result)


def sort_names(lines: Lines, names: list[str]) -> list[str]:
    """An insertion network: `a, b` --> `tl.minimum(a, b), tl.maximum(a, b)`, until sorted.

    Tile numbers are >= 0, so a literal 0 sorts to the front without any text.
    """
    result = sorted(names, key=lambda name: name != "0")
    zeros = sum(name == "0" for name in result)
    for end in range(zeros + 1, len(result)):
        for i in range(end, zeros, -1):
            a, b = result[i - 1], result[i]
            low, high = f"s{lines.fresh + 1}", f"s{lines.fresh + 2}"
            lines.fresh += 2
            lines.add(f"{low}, {high} = tl.minimum({a}, {b}), tl.maximum({a}, {b})")
            result[i - 1], result[i] = low, high
    return result
