"""From a plan with call-time data to the source of one Gluon file for Hopper.

The template is that of static masks; what finds an item's grains and masks them is another.
"""

from __future__ import annotations

import re

from maskdsl.codegen.emit import read_template
from maskdsl.codegen.emit_hopper import (
    LETTER,
    NO_TABLE,
    common_pieces,
    fill_template,
    in_gluon,
    kernel_template,
    words,
)
from maskdsl.codegen.emit_hopper_lists import (
    find_lines,
    has_sides,
    join_lines,
    kernel_parameters,
    more_names,
    numbers_of,
    place_functions,
    state_line,
)
from maskdsl.codegen.emit_walk import indent
from maskdsl.codegen.hopper_list_masks import mask_functions, side_functions
from maskdsl.codegen.plan import Plan

LETTER_SIZE = 64
LOAD_SIDES = (
    "for t in range(0, read_sides(mail.index(letter))):",
    "    for side in gl.static_range(2):",
    "        k_slot, v_slot = load_side(",
    "            t, mail.index(letter), k_desc, v_desc, k_grain_desc, v_grain_desc, k_s, v_s,",
    "            k_grains, v_grains, k_full, v_full, k_slot, v_slot, kv_head<MORE>, BLOCK_N,",
    "            GRAIN, K_SLOTS, V_SLOTS, side == 1)",
)
AFTER_SIDES = (
    "if WARP_GROUP == 0:",
    "    if sides > 0:  # values of the other warp group's last tile",
    "        mbarrier.wait(v_full.index(v_slot), v_phase)",
    "        release(V_FREE, v_slot)",
    "        v_slot, v_phase = advance(v_slot, v_phase, V_SLOTS)",
)
LISTED_FULL = (
    "else:",
    "    listed = (n - masked_steps) * TILE - state[{}]",
    "    if listed >= 0:  # FULL grains of a table need not be neighbours",
    "        place = FULLS + listed",
    "        start = start_of(place, loose, state, GRAIN)",
    "        scattered = are_apart(place, start, loose, state, GRAIN)",
)
LOAD_LOOSE = '''\
    """Fill one slot with loose grains first, first + 1, ...; `grains` is the ring cut into grains
    of at most 64 elements a row, as wide as the swizzle: HALVES of them side by side are a part."""
'''
LOAD_STEP = '''\
    """Keys or values of step n of an item."""
'''
READ_STATE = """\
    letter = state
    (item, batch, head, q_tile, part, narrow, rest_, loose_, masked_, first_, last_,
     state) = read(letter)
    # <JOIN_STATE>
"""
GRAINS = """\
    for j in gl.static_range(ROWS // GRAIN):
        start = start_of(first + j, count, state, GRAIN)
        for half"""
APART = """\
        end = start_of(place + TILE - 1, loose, state, GRAIN)
        scattered = end - start != BLOCK_N - GRAIN
"""
COPY = """\
            tma.async_copy_global_to_shared(desc, [batch, kv_head, start, half * WIDTH], bar,
                                            grains.index(place))
"""
COPY_COLUMNS = (
    "if (start >= COLUMNS_AT) & (start < FAR):",
    "    tma.async_copy_global_to_shared(",
    "        column_desc, [batch, state[{}], start - COLUMNS_AT, half * WIDTH], bar,",
    "        grains.index(place))",
    "else:",
    "    tma.async_copy_global_to_shared(desc, [batch, kv_head, start, half * WIDTH], bar,",
    "                                    grains.index(place))",
)


def fits_listed_letter(plan: Plan) -> bool:
    """Whether what an item must know fits a letter."""
    return len(LETTER) + len(numbers_of(plan).names) - 2 <= LETTER_SIZE


def emit_listed(plan: Plan) -> str:
    """The kernel file of a plan whose tiles are grains; equal plans give equal text."""
    names = [*LETTER, *numbers_of(plan).names[2:]]
    first = len(LETTER)
    write = (*(f"text = gl.where(place == {i}, {name}, text)" for i, name in enumerate(LETTER)),
             "# what the planner wrote about this item: numbers 2, 3, ... of its row",
             f"more = gl.load(here + (place - {first - 2}), mask=(place >= {first}) & "
             f"(place < {len(names)}), other=0)",
             f"text = gl.where(place < {first}, text, more)")
    sides = has_sides(plan)
    join = in_gluon(join_lines(plan))
    pieces = common_pieces(plan) | {
        "    # <BOUNDS>\n": indent(find_lines(plan)),
        "# <MASK_TILE>\n": mask_functions(plan) +
                           (read_template("hopper_side_functions") if sides else ""),
        "    # <WRITE>\n": indent(write),
        "    # <READ>\n": indent((f"return ({words(0, first)},",
                                 f"        ({words(first, len(names))},))")),
        "    # <STATE>\n": indent(("here, = state",)),
        "<SIDE_MASK>": side_functions(plan) if sides else "",
        "            # <LOAD_SIDES>\n": indent(LOAD_SIDES, 3) if sides else "",
        "        # <JOIN_STATE>\n": "        state = mail.index(letter)\n",
        "    # <JOIN_STATE>\n": indent(join),
        "        # <SIDES>\n": read_template("hopper_sides") if sides else "",
        "        # <AFTER_SIDES>\n": indent(AFTER_SIDES, 2) if sides else "",
        "    # <LISTED_FULL>\n": listed_full(plan),
        "<LETTER_SIZE>": str(LETTER_SIZE),
        "<MORE>": "".join(f", {name}" for name in more_names(plan)),
    }
    pieces |= dict.fromkeys(NO_TABLE, "")
    text = fill_template(listed_template(plan), pieces)
    return with_copies(text, plan) if plan.lists.columns else text


def state_index(plan: Plan, name: str) -> int:
    """Where a number stands in the joined state."""
    return [part.strip() for part in state_line(plan).split(",")].index(name)


def listed_full(plan: Plan) -> str:
    """How a step finds the FULL grains of a table."""
    if not plan.lists.tables:
        return ""
    place = state_index(plan, "static_full")
    return indent(tuple(line.format(place) for line in LISTED_FULL))


def patch(text: str, old: str, new: str) -> str:
    """The text with its one piece `old` replaced."""
    assert text.count(old) == 1, f"the template has changed near {old!r}"
    return text.replace(old, new)


def listed_template(plan: Plan) -> str:
    """The template of static masks with other functions for grains, and more arguments."""
    text = kernel_template()
    start, stop = text.index("@gluon.jit\ndef grain_at"), text.index("# <MASK_TILE>\n")
    text = text[:start] + read_template("hopper_lists") + place_functions(plan) + text[stop:]
    # items are read when a tile is loaded: their numbers would take registers all the time
    arrive = "        mbarrier.arrive(mail_empty.index(letter), count=1)\n"
    text = patch(text, arrive + "        kv_head", "        kv_head")
    text = patch(text, "            # <LOAD_SIDES>\n", "            # <LOAD_SIDES>\n" + arrive)
    text = patch(text, LOAD_LOOSE, LOAD_LOOSE + READ_STATE)
    text = patch(text, LOAD_STEP, LOAD_STEP + READ_STATE)
    for name, count in (("def load_loose(desc", 1), ("load_loose(grain_desc", 1),
                        ("load_loose(k_grain_desc", 1), ("load_loose(v_grain_desc", 1),
                        ("load_step(n, masked_steps", 2), ("load_step(n + 1, masked_steps", 1)):
        assert text.count(f"{name}, ") == count, f"the template has changed near {name!r}"
        text = text.replace(f"{name}, ", f"{name}<MORE>, ")
    text = text.replace("loose, state, BLOCK_N, GRAIN, BLOCK_N",
                        "loose, letter, BLOCK_N, GRAIN, BLOCK_N")
    # the letter that says stop is read like any other: it names places that exist
    text = patch(text, "open_item(item, count, q_tiles, batch_groups, groups, section, "
                 "split_first, split_count,\n                      splits",
                 "open_item(gl.minimum(item, items - 1), count, q_tiles, batch_groups, groups,\n"
                 "                      section, split_first, split_count, splits")
    # lists keep more numbers in registers, which makes ptxas order loops otherwise, too
    text, places = re.subn(r"if K_PARTS == 3:\n +(?=total = settle)", "", text)
    assert places == 2, "the template has changed near settle"
    text = patch(text, GRAINS, GRAINS.replace("gl.static_range", "range"))
    text = patch(text, APART, "        scattered = are_apart(place, start, loose, state, GRAIN)\n")
    text = re.sub(r"\btotal_len(?=[,)])", "total_len<MORE>", text)
    numbers = [f'"{p.name}"' for p in kernel_parameters(plan) if not p.is_pointer]
    text = text.replace('"total_len"]', f'"total_len", {", ".join(numbers)}]')
    return text


def with_copies(text: str, plan: Plan) -> str:
    """The file, with grains of columns loaded from their copies."""
    assert COPY in text, "the template's copy of a grain has changed"
    head = state_index(plan, "column_head")
    text = text.replace(COPY, indent(tuple(line.format(head) for line in COPY_COLUMNS), 3))
    text = text.replace("def load_loose(desc,", "def load_loose(desc, column_desc,")
    text = patch(text, " desc, grain_desc, ring", " desc, grain_desc, column_desc, ring")
    for name in ("", "k_", "v_"):
        text = patch(text, f"load_loose({name}grain_desc,",
                     f"load_loose({name}grain_desc, {name}column_desc,")
        if name:
            text = patch(text, f" {name}grain_desc, {name}s,",
                         f" {name}grain_desc, {name}column_desc, {name}s,")
    # in signatures and calls alike, over line ends too
    return re.sub(r"k_grain_desc,(\s+)v_grain_desc,",
                  r"k_grain_desc, v_grain_desc,\1k_column_desc, v_column_desc,", text)
