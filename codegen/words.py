"""The keys of a piece, as people say it."""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from maskdsl.codegen.bounds import describe_piece
from maskdsl.codegen.writer import leaves_of
from maskdsl.spans import ZERO, Piece
from maskdsl.trace import KV_LEN, TOTAL_LEN, Has, Lookup, P

LONGEST_ORIGIN = 60  # characters of what a piece comes from


@dataclass(slots=True)
class Bounds:
    """The terms of a piece that are not told yet: keys are >= all of `lower`, < all of `upper`."""

    lower: list[sympy.Expr]
    upper: list[sympy.Expr]
    of: list[str] = field(default_factory=list)  # "of p's chunk of 64"

    def take_numbers(self) -> tuple[int | None, int | None]:
        """(first key, last key + 1) where constants say so."""
        return _take_number(self.lower), _take_number(self.upper)

    def take_lines(self) -> tuple[int | None, int | None]:
        """(a, b) of keys from p + a to p + b where lines of slope 1 say so."""
        low, high = _take_line(self.lower), _take_line(self.upper)
        return low, None if high is None else high - 1


def describe_keys(piece: Piece) -> str:
    """The keys of a piece in words; odd bounds as they are computed.

    [max(0, p - 2047), min(kv_len, p + 1))  -->  'the last 2,048 keys up to p'
    """
    left = Bounds([t for t in piece.lo if t != ZERO],
                  [t for t in piece.hi if t not in (KV_LEN, TOTAL_LEN)])
    take_documents(left)
    take_chunks(left)
    causal = P + 1 in left.upper and len(left.upper) > 1
    if causal:
        left.upper.remove(P + 1)  # another line may bound the keys more narrowly
    numbers, lines = left.take_numbers(), left.take_lines()
    prefix = take_prefix(left)
    if causal and lines[1] is None:
        lines, causal = (lines[0], 0), False
    if left.lower or left.upper or causal or (prefix and numbers[1] is not None):
        text = describe_piece(Piece(piece.lo, piece.hi)).split(": ", 1)[1]
    else:
        text = " ".join([say_range(lines, numbers, prefix), *left.of])
    return text + say_rest(piece)


def take_documents(left: Bounds) -> None:
    """Bounds that are the document of p."""
    for start in [t for t in left.lower if t.func == Lookup and t.args[1] == P]:
        slot = str(start.args[0]).removeprefix("slot_").removesuffix("_start")
        stop = [t for t in left.upper if t.func == Lookup and t.args[1] == P
                and str(t.args[0]) == f"slot_{slot}_stop"]
        if stop:
            left.lower.remove(start)
            left.upper.remove(stop[0])
            left.of.append(f"in p's document (slot {slot!r})")


def take_chunks(left: Bounds) -> None:
    """Bounds that are p's chunk of keys, with chunks beside it, or begin or end with one."""
    lows, tops = ([(t, *_chunk(t)) for t in terms if _chunk(t)[0]]
                  for terms in (left.lower, left.upper))
    for low, size, before in lows:
        top = next((t for t in tops if t[1] == size), (None, size, size))
        both = top[0] is not None or P + 1 in left.upper
        words = say_chunks(size, before, top[2]) if both else ""
        if words and top[0] is not None:
            left.upper.remove(top[0])
            tops.remove(top)
        words = words or say_side(size, before, "from {} on")
        if words:
            left.lower.remove(low)
            left.of.append(words)
    for term, size, after in tops:
        if words := say_side(size, after, "before {}"):
            left.upper.remove(term)
            left.of.append(words)


def say_chunks(size: int, first: int, stop: int) -> str:
    """Keys from `first` to before `stop` after the start of p's chunk, where these are chunks."""
    if first > 0 or stop < size or first % size or stop % size:
        return ""
    if first == 0 and stop == size:
        return f"in p's own chunk of {size:,}"
    sides = [f"in {-first // size} before it"] if first else []
    sides += [f"in {stop // size - 1} after it"] if stop > size else []
    return f"in p's chunk of {size:,}, {' and '.join(sides)}"


def say_side(size: int, place: int, words: str) -> str:
    """The start of a chunk, `place` keys after the start of p's own."""
    if place % size:
        return ""
    away = abs(place) // size
    if not away:
        return words.format(f"p's chunk of {size:,}")
    if away == 1 and place > 0:
        return words.format(f"the chunk of {size:,} after p's")
    side = "after" if place > 0 else "before"
    return words.format(f"the chunk of {size:,} that is {away} {side} p's")


def take_prefix(left: Bounds) -> str:
    """The slot that tells how many keys there are, from the first on; else ""."""
    for term in left.upper:
        if term.is_Symbol and str(term).endswith("_length"):
            left.upper.remove(term)
            return str(term).removeprefix("slot_").removesuffix("_length")
    return ""


def say_range(lines: tuple[int | None, int | None], numbers: tuple[int | None, int | None],
              prefix: str) -> str:
    """Keys between lines and numbers."""
    (low, high), (first, stop) = lines, numbers
    until = "" if high is None else " up to p" if not high else f" up to {_place(high)}"
    if prefix:
        text = f"as many first keys as {prefix!r} says{until}"
    elif low is None and stop is not None and not first:
        return f"the first {_count(stop)}{until}"
    elif low is None and stop is not None and first is not None:
        between = f"key {first:,}" if first == stop - 1 else f"keys {first:,} to {stop - 1:,}"
        return between + until
    elif low is not None and low == high:
        text = f"key {_place(low)}"
    elif low is not None and high == 0:
        text = f"the last {_count(1 - low)} up to p"
    elif low is not None:
        text = f"keys from {_place(low)} on" if high is None else \
            f"keys {_place(low)} to {_place(high)}"
    else:
        text = f"all keys{until}"
    if first:
        text += f", but not the first {first:,}"
    return text if stop is None else f"{text}, of the first {stop:,}"


def say_rest(piece: Piece) -> str:
    """What is asked of each pair beside the bounds."""
    if piece.is_exact:
        return ""
    listed = sorted({repr(leaf.atom) for leaf in leaves_of(piece.rest)})
    if isinstance(piece.rest, Has):
        return f" that {listed[0]} {'lists' if piece.rest.held else 'does not list'}"
    if listed:
        return f", tested with {', '.join(listed)}"
    origin = " & ".join(name for name in piece.origin if name != "Causal()")
    return f", tested pair by pair{f' for {origin}' if 0 < len(origin) <= LONGEST_ORIGIN else ''}"


def _take_number(terms: list[sympy.Expr]) -> int | None:
    found = [t for t in terms if t.is_Integer]
    for term in found:
        terms.remove(term)
    return int(found[0]) if found else None


def _take_line(terms: list[sympy.Expr]) -> int | None:
    found = [t for t in terms if (t - P).is_Integer]
    for term in found:
        terms.remove(term)
    return int(found[0] - P) if found else None


def _chunk(term: sympy.Expr) -> tuple[int, int]:
    """(n, c) of n * floor(p / n) + c; (0, 0) of anything else."""
    floors = [t for t in sympy.Add.make_args(term) if t.has(sympy.floor)]
    shift = sympy.expand(term - sum(floors))
    if len(floors) != 1 or not shift.is_Integer:
        return 0, 0
    scale, rest = floors[0].as_coeff_Mul()
    if rest != sympy.floor(P / scale):
        return 0, 0
    return int(scale), int(shift)


def _place(shift: int) -> str:
    return "p" if not shift else f"p {'+' if shift > 0 else '-'} {abs(shift):,}"


def _count(keys: int) -> str:
    return "key" if keys == 1 else f"{keys:,} keys"
