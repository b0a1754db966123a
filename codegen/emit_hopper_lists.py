"""Text of what call-time data adds to the Hopper kernel (decision 0016).

A small Triton kernel (`emit_planner`) works out, for every item, how many grains of each kind it
has and where they stand in the lists, and leaves the numbers in global memory. The Gluon kernel's
planning warp copies them into the item's letter. Grains from lists are addressed like the loose
grains of static masks, by one index: static ones first, then those at listed distances, those of
tables, and loose columns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from maskdsl.codegen.emit import read_template
from maskdsl.codegen.emit_hopper import Place, in_gluon, place_text, places_of
from maskdsl.codegen.emit_lists import (
    TILE_SETUP,
    atom_setup,
    column_segments,
    names_text,
    parameters_text,
    slash_segments,
)
from maskdsl.codegen.emit_walk import indent
from maskdsl.codegen.listing import Parameter, Segment
from maskdsl.codegen.lists import atom_parameters, list_parameters
from maskdsl.codegen.plan import Plan
from maskdsl.dynamic import ListMask

SETS = ("both", "zero", "one")  # whose rows see a grain at a distance: both warp groups', or one's
GRAINS = 4  # of a tile


def has_sides(plan: Plan) -> bool:
    """Whether items hold one head: then the positions of the two warp groups lie 64 apart, and may
    see different slashes."""
    return bool(plan.lists.slashes) and plan.block_m == 128


def sets_of(plan: Plan) -> tuple[str, ...]:
    """The lists of distances."""
    if not plan.lists.slashes:
        return ()
    return SETS if has_sides(plan) else SETS[:1]


@dataclass(frozen=True, slots=True)
class Numbers:
    """What an item must know.

    lines    text of the planner that sets the numbers
    names    in the order of the plan's row; the first two are grains: all loose ones, all FULL ones
    static   where the static loops' grains lie
    places   where the entries of each list of distances lie
    columns  likewise for groups of 32 columns, as places in the list of columns; column_stop: where
             the stretch of columns ends that holds the i-th group
    """

    lines: tuple[str, ...]
    names: tuple[str, ...]
    static: tuple[Place, Place]
    places: dict[str, Place]
    columns: Place | None
    column_stop: str


def first_columns(plan: Plan) -> str:
    """The name of the index of the first grain of columns."""
    return "rest_end" if plan.lists.tables else "both_end" if plan.lists.slashes else "static_end"


def column_limit(plan: Plan) -> str:
    """Where the stretch of columns ends that grain i, a group of columns, belongs to."""
    return re.sub(r"\bi\b", f"(i - {first_columns(plan)})", numbers_of(plan).column_stop)


def numbers_of(plan: Plan) -> Numbers:
    """The numbers of an item and the text that sets them."""
    loose, full = places_of(plan)
    lines = [*plan.bounds, *loose.lines, *full.lines,
             f"static_end = {total_of(loose)}", f"static_full = {total_of(full)}"]
    names = [*loose.names, *full.names, "p_first", "static_end", "static_full"]
    names += hull_names(plan)
    places = {}
    for number, which in enumerate(sets_of(plan)):
        made, segments = slash_segments(plan)
        lines += [rename(line, which, number) for line in made]
        places[which] = place_text(which, tuple(
            Segment(rename(s.start, which, number), rename(s.stop, which, number))
            for s in segments))
        lines += [*places[which].lines, f"{which}_total = {total_of(places[which])}"]
        names += [*places[which].names, f"{which}_total"]
    ends, more = ["static_end"], []
    if "both" in places:
        ends.append("both_end")
        lines.append("both_end = static_end + both_total")
    if plan.lists.tables:
        lines += [f"part_end = {ends[-1]} + part_listed",
                  f"full_listed_whole = full_listed // {GRAINS} * {GRAINS}",
                  "rest_end = part_end + full_listed - full_listed_whole"]
        ends += ["part_end", "rest_end"]
        more = ["full_listed_whole", "tile_row"]
    columns, stop = None, ""
    if plan.lists.columns:
        made, segments = column_segments(plan)
        columns, stop = group_columns(segments)
        lines += [*made, *columns.lines, f"column_end = {ends[-1]} + {total_of(columns)}"]
        names += columns.names
        ends.append("column_end")
    sides = f"tl.cdiv(tl.maximum(zero_total, one_total), {GRAINS})" if has_sides(plan) else "0"
    lines += [f"sides = {sides}", f"loose = {ends[-1]}",
              "full = static_full" + (" + full_listed_whole" if plan.lists.tables else "")]
    names = ["sides", *names, *ends[1:], *more, *row_names(plan)]
    return Numbers(tuple(lines), ("loose", "full", *dict.fromkeys(names)), (loose, full), places,
                   columns, stop)


def row_names(plan: Plan) -> list[str]:
    """The rows of the call's data that serve an item's heads: divisions the planner does."""
    names = [f"slot_{atom.slot}_row" for atom in plan.lists.atoms if isinstance(atom, ListMask)]
    names += ["slash_row"] if plan.lists.slashes else []
    return names + (["column_row"] if plan.lists.columns else [])


def hull_names(plan: Plan) -> list[str]:
    """The ends of what the static loops visit, which listed grains leave out."""
    ends = [end for hull in plan.lists.hulls for end in (hull.start, hull.stop)]
    return [end for end in ends if not end.isdigit()]


def total_of(place: Place) -> str:
    """How many entries a place has."""
    return f"{place.name}_count{len(place.lines)}" if place.lines else "0"


def rename(text: str, which: str, number: int) -> str:
    """Text on the list of distances, for one of several."""
    text = re.sub(r"\b(slash|skip)_(first|last|start\d+|stop\d+)\b", rf"{which}_\1_\2", text)
    if not number:
        return text
    return re.sub(r"\bunion_slash_(marks|before)\b",
                  rf"union_slash_\1 + {number} * union_slash_words", text)


def group_columns(segments: tuple[Segment, ...]) -> tuple[Place, str]:
    """Groups of 32 columns: [a, b) + [c, d) --> the place of the i-th group's first column; and the
    text of where its stretch of columns ends."""
    lines, shifts, stops, done = [], [], [], "0"
    for n, segment in enumerate(segments):
        total, shift = f"columns_count{n + 1}", f"columns_shift{n}"
        lines.append(f"{total} = {done} + tl.cdiv({segment.stop} - {segment.start}, 32); "
                     f"{shift} = {segment.start} - 32 * {done}")
        shifts.append(shift)
        stops.append(segment.stop)
        done = total

    def choose(names: list[str]) -> str:
        text = names[-1]
        for n in range(len(names) - 2, -1, -1):
            text = f"tl.where(i < columns_count{n + 1}, {names[n]}, {text})"
        return text

    names = [*shifts, *stops, *(f"columns_count{n + 1}" for n in range(len(segments) - 1))]
    return (Place("columns", tuple(lines), tuple(names), f"32 * i + {choose(shifts)}"),
            choose(stops))


# --- the planner -----------------------------------------------------------------------------


def planner_parameters(plan: Plan) -> list[Parameter]:
    """The planner's arguments beyond lengths and heads."""
    found = [p for atom in plan.lists.atoms for p in atom_parameters(atom)]
    found += [p for p in list_parameters(plan.lists) if not p.name.endswith("_rows")]
    return [*found, Parameter("union_plan", True)]


def emit_planner(plan: Plan) -> str:
    """The kernel file that writes what every item must know of its mask."""
    numbers, lists = numbers_of(plan), plan.lists
    setup = [line for atom in lists.atoms for line in atom_setup(atom)]
    if lists.tables:
        setup += [TILE_SETUP[0], TILE_SETUP[1],
                  "full_listed = tl.load(union_tile_counts + 2 * tile_row)",
                  "part_listed = tl.load(union_tile_counts + 2 * tile_row + 1)"]
    for name, made, sets in (("slash", lists.slashes, len(sets_of(plan))),
                             ("column", lists.columns, 1)):
        if made:
            at = f"union_{name}"
            setup += [f"{name}_row = (batch * {at}_batch + head // {at}_share).to(tl.int64)",
                      f"{at}_marks += {name}_row * {sets} * {at}_words",
                      f"{at}_before += {name}_row * {sets} * {at}_words"]
    found = planner_parameters(plan)
    stores = tuple(f"tl.store(here + {i}, {name})" for i, name in enumerate(numbers.names))
    pieces = {
        "<HEADER>\n": f"mask  {plan.mask!r}\nitem  {plan.block_m} positions\n\n",
        "<SLOT_HELPERS>\n": read_template("slots"),
        "<MORE_NAMES>": names_text(found),
        "<MORE_PARAMETERS>": parameters_text(found, 15),
        "    # <SLOTS>\n": indent(tuple(setup)),
        "    # <NUMBERS>\n": indent(numbers.lines),
        "    # <STORES>\n": indent(stores),
        "<SIZE>": str(row_size(plan)),
    }
    template = read_template("hopper_plan")
    for mark, text in pieces.items():
        template = template.replace(mark, text)
    return template


def row_size(plan: Plan) -> int:
    """int32 numbers of an item in the planner's table."""
    return 32 if len(numbers_of(plan).names) <= 32 else 64


# --- the attention kernel --------------------------------------------------------------------


def kernel_parameters(plan: Plan) -> list[Parameter]:
    """The attention kernel's arguments beyond those of a static mask."""
    found = [p for atom in plan.lists.atoms for p in atom_parameters(atom)]
    names = ["plan", *(["tile_list", "tile_bits"] if plan.lists.tables else []),
             *(["slash_list"] if plan.lists.slashes else []),
             *(["slash_covered"] if plan.lists.slashes and plan.lists.columns else []),
             *(["column_list", "column_marks", "column_before"] if plan.lists.columns else [])]
    numbers = ["plan_batch", "plan_share", "plan_rows",
               *(["tile_capacity", "tile_words"] if plan.lists.tables else []),
               *(f"{kind}_{n}" for kind, made in (("slash", plan.lists.slashes),
                                                  ("column", plan.lists.columns)) if made
                 for n in ("capacity", "words")),
               *(["copy_share"] if plan.lists.columns else [])]
    found = [p for p in found if not p.name.endswith("_share")]  # the planner divides by those
    return [*found, *(Parameter(f"union_{n}", True) for n in names),
            *(Parameter(f"union_{n}", False) for n in numbers)]


def more_names(plan: Plan) -> list[str]:
    """The names of those arguments."""
    return [p.name for p in kernel_parameters(plan)]


def setup_lines(plan: Plan) -> list[str]:
    """Lines that lead every slot's data to this batch entry and head; the rows are known."""
    lines = []
    for atom in plan.lists.atoms:
        made = atom_setup(atom)
        if isinstance(atom, ListMask):
            made[0] = f"slot_{atom.slot}_row = gl.cast(slot_{atom.slot}_row, gl.int64)"
        lines += made
    return lines


def find_lines(plan: Plan) -> tuple[str, ...]:
    """The body of `find_tiles`: the item's row of the planner's table."""
    span = plan.block_m
    return ("row = batch * union_plan_batch + head // union_plan_share",
            f"row = row * ((q_len + {span - 1}) // {span}) + (p_first - q_offset) // {span}",
            "row = gl.minimum(row, union_plan_rows - 1)  # the letter that says stop has no item",
            f"here = union_plan + gl.cast(row, gl.int64) * {row_size(plan)}",
            "return gl.load(here), gl.load(here + 1), (here,)")


def join_lines(plan: Plan) -> tuple[str, ...]:
    """Lines that add to an item's numbers where its lists lie: the state that is asked for a grain
    or a mask."""
    names, lists = numbers_of(plan).names[2:], plan.lists
    lines, found = [f"{', '.join(names)}, = state"], list(names)

    def point(name: str, to: str) -> None:
        lines.append(f"{name} = {to}")
        found.append(name)

    if lists.slashes:
        lines.append("slash_row = gl.cast(slash_row, gl.int64)")
        point("slash_list", "union_slash_list + "
                            f"slash_row * ({len(sets_of(plan))} * union_slash_capacity)")
        found.append("union_slash_capacity")
    if lists.slashes and lists.columns:
        point("slash_covered", "union_slash_covered + slash_row * union_slash_words")
    if lists.tables:
        lines.append("tile_place = gl.cast(tile_row, gl.int64)")
        point("tile_list", "union_tile_list + tile_place * union_tile_capacity")
        point("tile_bits", "union_tile_bits + tile_place * union_tile_words")
        found.append("union_tile_capacity")
    if lists.columns:
        lines.append("column_row = gl.cast(column_row, gl.int64)")
        point("column_list", "union_column_list + column_row * union_column_capacity")
        point("column_marks", "union_column_marks + column_row * union_column_words")
        point("column_before", "union_column_before + column_row * union_column_words")
        # copies are those of a key/value head, lists may be shared by all
        point("column_head", "head // union_copy_share")
    return (*lines, f"state = ({', '.join(found)},)")


def state_line(plan: Plan) -> str:
    """The line that takes a joined state apart."""
    return re.sub(r"^state = \((.*)\)$", r"\1 = state", join_lines(plan)[-1])


def start_lines(plan: Plan) -> tuple[str, ...]:
    """The body of `start_of`."""
    numbers = numbers_of(plan)
    lines = [state_line(plan), f"start = ({numbers.static[0].text}) * GRAIN"]
    last = "static_end"
    if "both" in numbers.places:
        lines += ["there = (i >= static_end) & (i < both_end)",
                  # keys rise from grain to grain, distances fall
                  f"at = {of(numbers.places['both'], 'both_end - 1 - i')}",
                  "distance = tl.load(slash_list + tl.where(there, at, 0), mask=there, other=0)",
                  "start = tl.where(there, p_first - distance, start)"]
        last = "both_end"
    if plan.lists.tables:
        lines += ["# grains of tables: those live in part stand at the end of the list",
                  f"part = (i >= {last}) & (i < rest_end)",
                  f"at = tl.where(i < part_end, union_tile_capacity - 1 - (i - {last}), "
                  "full_listed_whole + (i - part_end))",
                  "whole = (i >= FULLS) & (i < FULLS + full_listed_whole)",
                  "at = tl.where(whole, i - FULLS, at)",
                  "tile = tl.load(tile_list + tl.where(part | whole, at, 0), mask=part | whole, "
                  "other=0)",
                  "start = tl.where(part | whole, tile * GRAIN, start)"]
        last = "rest_end"
    if numbers.columns is not None:
        lines += [f"column = {of(numbers.columns, f'i - {last}')}",
                  f"start = tl.where((i >= {last}) & (i < column_end), COLUMNS_AT + column, start)"]
    kept = "(i < count) | whole" if plan.lists.tables else "i < count"
    return in_gluon((*lines, f"return tl.where({kept}, start, FAR)"))


def side_lines(plan: Plan) -> tuple[str, ...]:
    """The body of `side_start`."""
    places = numbers_of(plan).places
    lines = [state_line(plan), "if OTHER:"]
    for which, number in (("one", 2), ("zero", 1)):
        lines += [f"    there = i < {which}_total",
                  f"    at = {of(places[which], f'{which}_total - 1 - i')} + "
                  f"{number} * union_slash_capacity"]
        if which == "one":
            lines.append("else:")
    return in_gluon((*lines, "distance = tl.load(slash_list + tl.where(there, at, 0), mask=there, "
                     "other=0)", "return tl.where(there, p_first - distance, FAR)"))


def of(place: Place, index: str) -> str:
    """The text of a place at another index."""
    return "(" + re.sub(r"\bi\b", f"({index})", place.text) + ")"


def place_functions(plan: Plan) -> str:
    """`full_at`, `start_of` and their like, in place of those of static masks."""
    full = numbers_of(plan).static[1]
    text = function("full_at(i, state)",
                    "The first grain of the FULL tile whose grains are the i-th and following.",
                    (state_line(plan), *in_gluon((f"return {full.text}",))))
    text += function("start_of(i, count, state, GRAIN: gl.constexpr)",
                     "The first key of loose grain i, or FAR from grain `count` on; COLUMNS_AT and "
                     "more for\n    places in the copies of columns.", start_lines(plan))
    apart = "(start >= COLUMNS_AT) | " if plan.lists.columns else ""
    text += function(
        "are_apart(i, start, count, state, GRAIN: gl.constexpr)",
        "Whether grain i at `start` and the next three are not one tile of keys.",
        ("b = start_of(i + 1, count, state, GRAIN)", "c = start_of(i + 2, count, state, GRAIN)",
         "d = start_of(i + 3, count, state, GRAIN)",
         f"return {apart}(b - start != GRAIN) | (c - b != GRAIN) | (d - c != GRAIN)"))
    if has_sides(plan):
        text += function("side_start(i, state, OTHER: gl.constexpr)",
                         "The first key of grain i that the rows of one warp group alone see.",
                         side_lines(plan))
    return text


def function(head: str, about: str, lines: tuple[str, ...]) -> str:
    """One function of the file."""
    return f'@gluon.jit\ndef {head}:\n    """{about}"""\n{indent(lines)}\n\n'
