"""From a plan in grains to the source of one Gluon file for Hopper.

The template is the same for every mask; four short functions in it are the mask's own: which keys
an item sees (`find_tiles`), where its loose grains and FULL tiles lie (`grain_at`, `full_at`), and
the mask of one tile (`live_pairs`).
"""

from __future__ import annotations

import re

from maskdsl.codegen.emit import count_text, indent, read_template
from maskdsl.codegen.listing import Segment
from maskdsl.codegen.plan import Plan

# compile-time constants that all functions of the file share
CONSTANTS = ("HEADS_PACKED", "SPAN", "NARROW", "BLOCK_N", "GRAIN", "K_SLOTS", "V_SLOTS", "WITH_LSE")

# what a letter holds of every item; the mask's own numbers follow
LETTER = ("item", "batch", "head", "q_tile", "part", "narrow", "rest", "loose", "masked_steps", "first",
          "last")
LETTER_SIZE = 32


def emit_hopper(plan: Plan) -> str:
    """The kernel file of a plan whose tiles are grains; equal plans give equal text."""
    # the last segment first: the causal border and a sink, both narrow, share the first tile then
    loose, loose_names, loose_at = place_text("loose", plan.masked[-1:] + plan.masked[:-1])
    full, full_names, full_at = place_text("full", plan.full)
    names = [*loose_names, *full_names] or ["nothing"]
    state, letter = ", ".join(names), [*LETTER, *names]
    places = range(len(letter))
    assert len(letter) <= LETTER_SIZE
    counts = [f"{name}_count{len(segments) - 1}" if segments else "gl.to_tensor(0)"
              for name, segments in (("loose", plan.masked), ("full", plan.full))]
    bounds = (*plan.bounds, *loose, *full,
              *(("nothing = gl.to_tensor(0)",) if names == ["nothing"] else ()),
              f"return {', '.join(counts)}, {state}")
    order = "light - 1 - place" if plan.last_first else "place"
    which = "last" if plan.last_first else "first"
    pieces = {
        "<HEADER>\n": header_text(plan),
        "    # <BOUNDS>\n": indent(in_gluon(bounds)),
        "    # <GRAIN_AT>\n": indent(in_gluon((f"return {loose_at}",))),
        "    # <FULL_AT>\n": indent(in_gluon((f"return {full_at}",))),
        "# <MASK_TILE>\n": mask_text(plan),
        "    # <TILE_ORDER>\n": indent((f"# the {which} query tiles see most keys: they start first",
                                        f"q_tile = {order}")),
        "    # <WRITE>\n": indent(tuple(f"text = gl.where(place == {i}, {name}, text)"
                                        for i, name in enumerate(letter))),
        "    # <READ>\n": indent((f"return {', '.join(f'word_of(letter, {i})' for i in places)}",)),
        "<LETTER>": ", ".join(letter),
        "<NEXT_STATE>": ", ".join(f"next_{name}" for name in names),
        "<STATE>": state,
        "<CONSTANTS>": ", ".join(f"{name}: gl.constexpr" for name in CONSTANTS),
        "<CONSTANT_NAMES>": ", ".join(CONSTANTS),
    }
    template = read_template("hopper")
    for mark, text in pieces.items():
        template = template.replace(mark, text)
    return template


def header_text(plan: Plan) -> str:
    """What the file is, for a reader who finds it in the cache."""
    return (f"mask         {plan.mask!r}\n"
            f"item         128 rows of {plan.block_m} positions, grains of {plan.block_n} keys\n"
            f"FULL tiles   {count_text(plan.full)}, no mask\n"
            f"loose        {count_text(plan.masked)}\n")


def in_gluon(lines: tuple[str, ...]) -> tuple[str, ...]:
    """Text of a plan, in Gluon's names."""
    return tuple(line.replace("tl.", "gl.") for line in lines)


def place_text(name: str, segments: tuple[Segment, ...]) -> tuple[list[str], list[str], str]:
    """Several segments as one range: lines that set counts and shifts, the names `place i` needs,
    and its text.

    [a, b) + [c, d)  -->  count0 = b - a, shift1 = c - count0, count1 = count0 + (d - c);
                          i + where(i < count0, a, shift1)
    """
    lines: list[str] = []
    names: list[str] = []
    shifts: list[str] = []
    done = ""
    for n, segment in enumerate(segments):
        width = segment.stop if segment.start == "0" else f"({segment.stop} - {segment.start})"
        shift = segment.start
        if done:
            shift = f"{name}_shift{n}"
            lines.append(f"{shift} = {segment.start} - {done}")
        shifts.append(shift)
        if not shift.isdigit():
            names.append(shift)
        total = f"{name}_count{n}"
        lines.append(f"{total} = {f'{done} + {width}' if done else width.strip('()')}")
        done = total
    text = shifts[-1] if shifts else "0"
    for n in range(len(shifts) - 2, -1, -1):
        text = f"tl.where(i < {name}_count{n}, {shifts[n]}, {text})"
        names.append(f"{name}_count{n}")
    return lines, names, f"i + {text}" if text != "0" else "i"


INTERVAL = re.compile(r"\((?:\(k >= (\w+)\) & )?\(?k < (\w+)\)?\)")


def mask_text(plan: Plan) -> str:
    """The functions that mask a tile: by words of bits where the mask of a row is a union of
    intervals, else pair by pair."""
    words = []
    for test in plan.tests:
        found = INTERVAL.fullmatch(test)
        if found is None:
            return read_template("hopper_mask").replace(
                "    # <LIVE>\n", indent(in_gluon((*plan.rows, f"return {plan.live}"))))
        low, high = found.groups()
        word = f"below({high} - start)"
        words.append(f"({word} & ~below({low} - start))" if low else word)
    lines = (*in_gluon(plan.rows), "start = start + p * 0", f"return {' | '.join(words)}")
    return read_template("hopper_words").replace("    # <WORDS>\n", indent(lines))
