"""A mask as one HTML file, to be zoomed from the whole matrix to single pairs.

The file holds no picture and no list of pairs: it holds the mask's comparisons (and the call's
lists, where the mask has slots) and a small program that judges boxes of pairs as
`maskdsl.raster` does. So a page of a million tokens is as small as one of a thousand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import sympy

from maskdsl.cells import PALETTE, call_shape, parts_of, view_call
from maskdsl.dynamic import Blocks, ListMask, TokenTopK, slots_of
from maskdsl.errors import PictureError
from maskdsl.expr import And, Mask, Not, Or
from maskdsl.grains import grains_of
from maskdsl.heads import count_heads
from maskdsl.plot_grid import split_heads
from maskdsl.raster import View, is_opaque, trace_or_none
from maskdsl.shape import Shape
from maskdsl.text import compare_text
from maskdsl.tiles import names_of
from maskdsl.trace import All, Condition, Ge, Has, Lookup

MOST_ENTRIES = 1 << 22  # of call-time lists; about 30 MB of text
MOST_TESTS = 12  # comparisons of an atom that are told one by one
Json = Any


def write_page(mask: Mask, path: str | Path | None = None, q_len: int | None = None,
               kv_len: int | None = None, *, q_offset: int | None = None,
               total_len: int | None = None, batch: int = 0, heads: int | None = None,
               head: int = 0, slots: Mapping[str, object] | None = None,
               tile: tuple[int, int] = (128, 128)) -> str:
    """One self-contained HTML file of the mask in one call; returns its text.

    path           also write it there
    q_len, kv_len  tokens; default: a length at which the mask's own sizes can be seen
    head, heads    which head of how many, for slots with data for each head; a mask with PerHead
                   gets a menu of its heads
    slots          the call-time data of every slot, by name; it goes into the file
    tile           (queries, keys), lines that show from near

    The page zooms with the wheel, moves by dragging, and tells for the pair under the pointer which
    operand keeps it and which comparisons say so. It loads nothing. Errors: ShapeError,
    MissingSlotError, PictureError for functions that cannot be traced.
    """
    if is_opaque(mask):
        raise PictureError(f"a page of {mask!r}", "its function only runs in Python, and the page "
                           "judges pairs by itself", "mask.plot(), or a function to be traced")
    shape = call_shape(mask, q_len, kv_len, q_offset, total_len)
    if not shape.q_len or not shape.kv_len:
        raise PictureError(f"a page of {shape.q_len} x {shape.kv_len} pairs", "there is nothing "
                           "to draw", "a call with queries and keys")
    count = heads or count_heads(mask)
    data = {"mask": repr(mask), "q_len": shape.q_len, "kv_len": shape.kv_len,
            "q_offset": shape.q_offset, "tile": list(tile),
            "heads": [write_head(title, one, view_call(
                one, shape, batch, first if count_heads(mask) else head, count,
                {s.slot: (slots or {}).get(s.slot) for s in slots_of(one)}))
                for title, first, one in split_heads(mask)]}
    text = fill_page(data)
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def fill_page(data: Json) -> str:
    """The page's template with its program and data."""
    folder = files("maskdsl")
    text = (folder / "page.html").read_text(encoding="utf-8")
    plain = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no </script> inside
    for mark, part in (("/*JUDGE*/", (folder / "page_judge.js").read_text(encoding="utf-8")),
                       ("/*VIEW*/", (folder / "page_view.js").read_text(encoding="utf-8")),
                       ("/*DATA*/", plain)):
        text = text.replace(mark, part, 1)
    return text


def write_head(title: str, mask: Mask, view: View) -> Json:
    """One kind of head: the operands of its union, and what their comparisons refer to."""
    parts = [{"name": name, "colour": PALETTE[i % len(PALETTE)], "condition": write_mask(part),
              "grains": grains_of(part), "atoms": [write_atom(atom) for atom in leaves_of(part)]}
             for i, (name, part) in enumerate(parts_of(mask))]
    return {"title": title or "all heads", "parts": parts, "env": write_env(mask, view)}


def leaves_of(mask: Mask) -> Iterator[Mask]:
    """The distinct atoms of a mask, in order."""
    yield from dict.fromkeys(node for node in mask.walk() if not isinstance(node, (Or, And, Not)))


def write_atom(atom: Mask) -> Json:
    """An atom, and the comparisons it makes with their text."""
    condition = write_mask(atom)
    tests: list[tuple[str, Json]] = [(f"{atom!r} lists the pair", condition)] \
        if isinstance(atom, ListMask) else _tests(trace_or_none(atom))
    if not 0 < len(tests) <= MOST_TESTS:
        tests = [(repr(atom), condition)]
    return {"name": repr(atom), "condition": condition, "tests": tests}


def _tests(condition: Condition | None) -> list[tuple[str, Json]]:
    """Every comparison of a condition, with its text."""
    if isinstance(condition, Ge):
        left, right = compare_text(condition.value).split(" >= ")
        key_is_right = "k" in _words(right) and "k" not in _words(left)
        text = f"{right} <= {left}" if key_is_right else f"{left} >= {right}"
        return [(text, write_condition(condition))]
    return [] if condition is None or isinstance(condition, Has) else \
        [test for arg in condition.args for test in _tests(arg)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def write_mask(mask: Mask) -> Json:
    """A mask as nested lists: "and", "or", "not", "ge", "has"."""
    if isinstance(mask, (Or, And)):
        return ["or" if isinstance(mask, Or) else "and", *map(write_mask, mask.args)]
    if isinstance(mask, Not):
        return ["not", write_mask(mask.operand)]
    if isinstance(mask, ListMask):
        return ["has", mask.slot]
    condition = trace_or_none(mask)
    assert condition is not None  # opaque masks were refused
    return write_condition(condition)


def write_condition(condition: Condition) -> Json:
    """A traced condition as nested lists."""
    if isinstance(condition, Ge):
        return ["ge", write_integer(condition.value)]
    if isinstance(condition, Has):
        listed = ["has", condition.atom.slot]
        return listed if condition.held else ["not", listed]
    return ["and" if isinstance(condition, All) else "or", *map(write_condition, condition.args)]


def write_integer(e: sympy.Expr) -> Json:
    """An integer expression as nested lists: p - 64*floor(p/64) --> ["+", "p", ["*", -64, ...]]."""
    if e.is_Integer:
        return int(e)
    if e.is_Symbol:
        return str(e.name)
    if e.func == Lookup:
        return ["lookup", str(e.args[0]), write_integer(e.args[1])]
    if e.func == sympy.floor:
        over, under = sympy.fraction(sympy.together(e.args[0]))
        return ["//", write_integer(over), write_integer(under)]
    if e.is_Pow:
        return ["*", *[write_integer(e.base)] * int(e.exp)]
    names = {sympy.Mod: "%", sympy.Max: "max", sympy.Min: "min"}
    name = "+" if e.is_Add else "*" if e.is_Mul else names[e.func]
    return [name, *map(write_integer, e.args)]


# --- what comparisons refer to --------------------------------------------------------------------


def write_env(mask: Mask, view: View) -> Json:
    """Lengths, the tables of documents, and the lists of slots."""
    numbers, tables = {}, {}
    for name, value in names_of(view.shape, view.batch, view.head, mask, view.bound).items():
        if isinstance(value, np.ndarray) and value.ndim:
            tables[name] = write_table(value)
        elif not name.startswith("in_"):
            numbers[name] = int(value)
    lists = {atom.slot: write_list(atom, view) for atom in slots_of(mask)
             if isinstance(atom, ListMask)}
    return {"names": numbers, "tables": tables, "slots": lists}


def write_table(table: Any) -> Json:
    """A table of positions -1 ... length as the positions where its value changes."""
    change = np.flatnonzero(np.diff(table)) + 1
    starts = [-(1 << 31), *(change - 1).tolist()]  # entry i belongs to position i - 1
    return {"starts": starts, "values": table[[0, *change.tolist()]].tolist()}


def write_list(atom: ListMask, view: View) -> Json:
    """The lists of one slot for one head: sorted columns and distances, blocks row by row."""
    bound, lead = view.bound[atom.slot], view.lead(atom.slot)
    listed: dict[str, Json] = {}
    if bound.vertical is not None:
        listed["columns"] = np.flatnonzero(bound.vertical[lead].cpu().numpy()).tolist()
    if bound.slash is not None:
        listed["slashes"] = np.flatnonzero(bound.slash[lead].cpu().numpy()).tolist()
    if bound.table is not None:
        table = bound.table[lead].cpu().numpy()
        check_entries(atom, int(table.sum()), view.shape)
        listed["blocks"] = [np.flatnonzero(row).tolist() for row in table]
        listed["size"] = list(atom.blocks) if isinstance(atom, (Blocks, TokenTopK)) else [64, 1]
        listed["offset"] = view.shape.q_offset
    return listed


def check_entries(atom: ListMask, entries: int, shape: Shape) -> None:
    """Refuse lists that would make a page no browser opens."""
    if entries > MOST_ENTRIES:
        raise PictureError(f"a page with {entries:,} entries of {atom!r} at {shape.q_len:,} x "
                           f"{shape.kv_len:,}", f"more than {MOST_ENTRIES:,} make it too large",
                           "a shorter call, or mask.plot()")
